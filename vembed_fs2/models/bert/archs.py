"""The named architectures of BERT and its relatives."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.bert.config import BertConfig


def register_bert_archs(container: DependencyContainer) -> None:
    """Register the architectures, the base first; the others say how they differ from it."""
    _register_bert(container)
    _register_roberta(container)
    _register_others(container)


def _register_bert(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, BertConfig)

    @arch("bert_base")
    def bert_base() -> BertConfig:
        """The base: 12 layers, 768 dimensions, mean pooling, unit length."""
        return BertConfig()

    @arch("bert_large")
    def bert_large() -> BertConfig:
        """24 layers, 1024 dimensions."""
        return _large(bert_base())

    @arch("minilm_l12")
    def minilm_l12() -> BertConfig:
        """384 dimensions in 12 layers: all-MiniLM-L12-v2."""
        config = bert_base()
        config.model_dim = 384
        config.ffn_inner_dim = 1536
        return config

    @arch("minilm_l6")
    def minilm_l6() -> BertConfig:
        """Every second layer of MiniLM: all-MiniLM-L6-v2."""
        config = minilm_l12()
        config.num_layers = 6
        return config

    @arch("bge_small")
    def bge_small() -> BertConfig:
        """The size of MiniLM with 12 layers, but the first token's state."""
        config = minilm_l12()
        config.head.pooling = "cls"
        return config

    @arch("bge_base")
    def bge_base() -> BertConfig:
        """BERT base, but the first token's state."""
        config = bert_base()
        config.head.pooling = "cls"
        return config

    @arch("bge_large")
    def bge_large() -> BertConfig:
        """BERT large, but the first token's state."""
        config = bert_large()
        config.head.pooling = "cls"
        return config

    @arch("e5_small")
    def e5_small() -> BertConfig:
        """The same as MiniLM with 12 layers. Texts start with "query: " or "passage: "."""
        return minilm_l12()

    @arch("e5_base")
    def e5_base() -> BertConfig:
        """The same as BERT base. Texts start with "query: " or "passage: "."""
        return bert_base()

    @arch("e5_large")
    def e5_large() -> BertConfig:
        """The same as BERT large. Texts start with "query: " or "passage: "."""
        return bert_large()

    @arch("multilingual_e5_small")
    def multilingual_e5_small() -> BertConfig:
        """The size of MiniLM with 12 layers, and the vocabulary of XLM-RoBERTa."""
        config = minilm_l12()
        config.vocab_size = 250_037
        return config

    @arch("tiny")
    def tiny() -> BertConfig:
        """Two layers of 32 dimensions, for tests."""
        config = bert_base()
        config.model_dim = 32
        config.max_seq_len = 64
        config.vocab_size = 100
        config.num_layers = 2
        config.num_attn_heads = 2
        config.ffn_inner_dim = 64

        return config


def _register_roberta(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, BertConfig)

    @arch("roberta_base")
    def roberta_base() -> BertConfig:
        """The size of BERT base: positions counted from the padding token's, one segment, no pooler."""
        return BertConfig(
            model_type="roberta",
            max_seq_len=514,
            vocab_size=50_265,
            pad_idx=1,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            pooler=False,
        )

    @arch("roberta_large")
    def roberta_large() -> BertConfig:
        """24 layers, 1024 dimensions."""
        return _large(roberta_base())

    @arch("distilroberta")
    def distilroberta() -> BertConfig:
        """Every second layer of RoBERTa, with a pooler."""
        config = roberta_base()
        config.num_layers = 6
        config.pooler = True
        return config

    @arch("xlm_roberta_base")
    def xlm_roberta_base() -> BertConfig:
        """RoBERTa with the vocabulary of a hundred languages."""
        config = roberta_base()
        config.model_type = "xlm-roberta"
        config.vocab_size = 250_002
        return config

    @arch("xlm_roberta_large")
    def xlm_roberta_large() -> BertConfig:
        """24 layers, 1024 dimensions."""
        return _large(xlm_roberta_base())

    @arch("multilingual_e5_base")
    def multilingual_e5_base() -> BertConfig:
        """The size of XLM-RoBERTa base, with a pooler. Texts start with "query: " or "passage: "."""
        config = xlm_roberta_base()
        config.pooler = True
        return config

    @arch("multilingual_e5_large")
    def multilingual_e5_large() -> BertConfig:
        """The size of XLM-RoBERTa large, with a pooler. Texts start with "query: " or "passage: "."""
        config = xlm_roberta_large()
        config.pooler = True
        return config

    @arch("bge_m3")
    def bge_m3() -> BertConfig:
        """The size of XLM-RoBERTa large with 8192 positions and a pooler: the first token's state."""
        config = multilingual_e5_large()
        config.max_seq_len = 8194
        config.head.pooling = "cls"
        return config


def _register_others(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, BertConfig)

    @arch("distilbert_base")
    def distilbert_base() -> BertConfig:
        """Every second layer of BERT base, without segments and pooler."""
        return BertConfig(model_type="distilbert", type_vocab_size=0, num_layers=6, pooler=False)

    @arch("mpnet_base")
    def mpnet_base() -> BertConfig:
        """The size of BERT base: attention with a bias for distances, no segments, no pooler."""
        return BertConfig(
            model_type="mpnet",
            max_seq_len=514,
            vocab_size=30_527,
            pad_idx=1,
            type_vocab_size=0,
            num_relative_buckets=32,
            layer_norm_eps=1e-5,
            pooler=False,
        )

    @arch("all_mpnet_base")
    def all_mpnet_base() -> BertConfig:
        """MPNet base with a pooler: all-mpnet-base-v2."""
        config = mpnet_base()
        config.pooler = True
        return config

    @arch("multi_qa_mpnet_base_dot")
    def multi_qa_mpnet_base_dot() -> BertConfig:
        """MPNet base with a pooler: the first token's state, of any length."""
        config = all_mpnet_base()
        config.head.pooling = "cls"
        config.head.normalize = False
        return config


def _large(config: BertConfig) -> BertConfig:
    config.model_dim = 1024
    config.num_layers = 24
    config.num_attn_heads = 16
    config.ffn_inner_dim = 4096
    return config

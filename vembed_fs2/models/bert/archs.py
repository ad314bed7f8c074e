from __future__ import annotations

from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.bert.factory import BertConfig


def register_bert_archs(container: DependencyContainer) -> None:
    """Register the named architectures."""
    arch = ConfigRegistrar(container, BertConfig)

    @arch("bert_base")
    def bert_base() -> BertConfig:
        """The base: 12 layers, 768 dimensions, mean pooling, unit length."""
        return BertConfig()

    @arch("bert_large")
    def bert_large() -> BertConfig:
        """24 layers, 1024 dimensions."""
        config = bert_base()
        config.model_dim = 1024
        config.num_layers = 24
        config.num_attn_heads = 16
        config.ffn_inner_dim = 4096
        return config

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

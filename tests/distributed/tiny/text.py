from __future__ import annotations

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.models.bert.config import BertType
from vembed_fs2.models.modernbert import ModernBertConfig
from vembed_fs2.models.qwen3 import Qwen3Config

from ..families import Case
from ..steps import texts


def bert_like(model_type: BertType, **options: object) -> BertConfig:
    sizes = {"model_dim": 16, "max_seq_len": 32, "vocab_size": 50, "num_layers": 2, "num_attn_heads": 2}
    dropout = {"dropout_p": 0.1, "attn_dropout_p": 0.1}
    config: dict[str, object] = {**sizes, **dropout, "ffn_inner_dim": 24, "logit_scale_init": 2.0, **options}
    return BertConfig(model_type=model_type, **config)  # type: ignore[arg-type]


ROBERTA = bert_like("roberta", pad_idx=1, type_vocab_size=1)

DISTILBERT = bert_like("distilbert", type_vocab_size=0, pooler=False, sinusoidal_positions=True)

MPNET = bert_like("mpnet", pad_idx=1, type_vocab_size=0, num_relative_buckets=32)

MODERNBERT = ModernBertConfig(
    model_dim=16, max_seq_len=32, vocab_size=50, pad_idx=0, num_layers=3, num_attn_heads=2, ffn_inner_dim=24,
    global_attn_interval=2, local_attn_window=6, attn_bias=True, ffn_bias=True, norm_bias=True,
    embed_dropout_p=0.1, attn_dropout_p=0.1, ffn_dropout_p=0.1, logit_scale_init=2.0, head=HeadConfig(pooling="mean"),
)  # fmt: skip

QWEN3 = Qwen3Config(
    model_dim=16, max_seq_len=32, vocab_size=51, num_layers=2, num_attn_heads=4, num_key_value_heads=2, head_dim=8,
    ffn_inner_dim=24, attn_dropout_p=0.1, logit_scale_init=2.0,
)  # fmt: skip

QWEN2 = Qwen3Config(
    variant="qwen2", model_dim=16, max_seq_len=32, vocab_size=51, num_layers=2, num_attn_heads=4,
    num_key_value_heads=2, head_dim=None, ffn_inner_dim=24, attn_dropout_p=0.1, logit_scale_init=2.0,
    qk_norm=False, qkv_bias=True, is_causal=False, head=HeadConfig(pooling="mean"),
)  # fmt: skip

CASES = {
    "RoBERTa": Case("vembed_bert", ROBERTA, texts, texts),
    "DistilBERT": Case("vembed_bert", DISTILBERT, texts, texts),
    "MPNet": Case("vembed_bert", MPNET, texts, texts),
    "ModernBERT": Case("vembed_modernbert", MODERNBERT, texts, texts),
    "Qwen3": Case("vembed_qwen3", QWEN3, texts, texts),
    "Qwen2, both directions": Case("vembed_qwen3", QWEN2, texts, texts),
}

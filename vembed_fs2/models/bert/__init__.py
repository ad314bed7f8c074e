"""BERT, and the embedding models that are built on it: MiniLM, BGE, E5."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.bert.archs import register_bert_archs
from vembed_fs2.models.bert.config import BERT_FAMILY, BertConfig
from vembed_fs2.models.bert.factory import BertFactory, create_bert_model
from vembed_fs2.models.bert.interop import BertCheckpointFormat, get_bert_model_hub
from vembed_fs2.models.bert.model import BertModel
from vembed_fs2.models.family import register_family

__all__ = [
    "BERT_FAMILY",
    "BertCheckpointFormat",
    "BertConfig",
    "BertFactory",
    "BertModel",
    "create_bert_model",
    "get_bert_model_hub",
    "register_bert",
]


def register_bert(container: DependencyContainer) -> None:
    """Register the family, its architectures and its format."""
    register_family(
        container,
        BERT_FAMILY,
        kls=BertModel,
        config_kls=BertConfig,
        factory=create_bert_model,
        checkpoint_format=BertCheckpointFormat(),
        supports_packed=True,
        supports_tensor_parallel=True,
    )
    register_bert_archs(container)

"""BERT, and the embedding models that are built on it: MiniLM, BGE, E5."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.bert.archs import register_bert_archs
from vembed_fs2.models.bert.config import BERT_FAMILY as BERT_FAMILY
from vembed_fs2.models.bert.config import BertConfig as BertConfig
from vembed_fs2.models.bert.factory import BertFactory as BertFactory
from vembed_fs2.models.bert.factory import create_bert_model as create_bert_model
from vembed_fs2.models.bert.interop import BertCheckpointFormat as BertCheckpointFormat
from vembed_fs2.models.bert.interop import get_bert_model_hub as get_bert_model_hub
from vembed_fs2.models.bert.model import BertModel as BertModel
from vembed_fs2.models.family import register_family


def register_bert(container: DependencyContainer) -> None:
    """Register the family and its architectures."""
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

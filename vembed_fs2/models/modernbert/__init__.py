"""ModernBERT, and the embedding models that are built on it."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.family import register_family
from vembed_fs2.models.modernbert.archs import register_modernbert_archs
from vembed_fs2.models.modernbert.config import MODERNBERT_FAMILY as MODERNBERT_FAMILY
from vembed_fs2.models.modernbert.config import ModernBertConfig as ModernBertConfig
from vembed_fs2.models.modernbert.factory import ModernBertFactory as ModernBertFactory
from vembed_fs2.models.modernbert.factory import create_modernbert_model as create_modernbert_model
from vembed_fs2.models.modernbert.interop import ModernBertCheckpointFormat as ModernBertCheckpointFormat
from vembed_fs2.models.modernbert.interop import get_modernbert_model_hub as get_modernbert_model_hub
from vembed_fs2.models.modernbert.model import ModernBertModel as ModernBertModel


def register_modernbert(container: DependencyContainer) -> None:
    """Register the family and its architectures."""
    register_family(
        container,
        MODERNBERT_FAMILY,
        kls=ModernBertModel,
        config_kls=ModernBertConfig,
        factory=create_modernbert_model,
        checkpoint_format=ModernBertCheckpointFormat(),
        supports_packed=True,
        supports_tensor_parallel=True,
    )
    register_modernbert_archs(container)

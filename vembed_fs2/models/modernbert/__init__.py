"""ModernBERT, and the embedding models that are built on it."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.family import register_family
from vembed_fs2.models.modernbert.archs import register_modernbert_archs
from vembed_fs2.models.modernbert.config import MODERNBERT_FAMILY, ModernBertConfig
from vembed_fs2.models.modernbert.factory import ModernBertFactory, create_modernbert_model
from vembed_fs2.models.modernbert.interop import ModernBertCheckpointFormat, get_modernbert_model_hub
from vembed_fs2.models.modernbert.model import ModernBertModel

__all__ = [
    "MODERNBERT_FAMILY",
    "ModernBertCheckpointFormat",
    "ModernBertConfig",
    "ModernBertFactory",
    "ModernBertModel",
    "create_modernbert_model",
    "get_modernbert_model_hub",
    "register_modernbert",
]


def register_modernbert(container: DependencyContainer) -> None:
    """Register the family, its architectures and its format."""
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

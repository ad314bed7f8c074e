"""Decoders of texts as embedding models: Qwen3, Qwen2, Mistral and Llama, causal or not."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.family import register_family
from vembed_fs2.models.qwen3.archs import register_qwen3_archs
from vembed_fs2.models.qwen3.config import QWEN3_FAMILY, Qwen3Config, RopeScaling
from vembed_fs2.models.qwen3.factory import Qwen3Factory, create_qwen3_model
from vembed_fs2.models.qwen3.interop import Qwen3CheckpointFormat, get_qwen3_model_hub
from vembed_fs2.models.qwen3.model import Qwen3Model

__all__ = [
    "QWEN3_FAMILY",
    "Qwen3CheckpointFormat",
    "Qwen3Config",
    "Qwen3Factory",
    "Qwen3Model",
    "RopeScaling",
    "create_qwen3_model",
    "get_qwen3_model_hub",
    "register_qwen3",
]


def register_qwen3(container: DependencyContainer) -> None:
    """Register the family, its architectures and its format."""
    register_family(
        container,
        QWEN3_FAMILY,
        kls=Qwen3Model,
        config_kls=Qwen3Config,
        factory=create_qwen3_model,
        checkpoint_format=Qwen3CheckpointFormat(),
        supports_packed=True,
        supports_tensor_parallel=True,
    )
    register_qwen3_archs(container)

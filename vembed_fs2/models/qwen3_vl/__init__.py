"""Qwen3-VL as an embedding model of texts, images and videos in any order."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.family import register_family
from vembed_fs2.models.qwen3_vl.archs import register_qwen3_vl_archs
from vembed_fs2.models.qwen3_vl.config import QWEN3_VL_FAMILY, Qwen3VLConfig, VisionConfig
from vembed_fs2.models.qwen3_vl.factory import Qwen3VLFactory, create_qwen3_vl_model
from vembed_fs2.models.qwen3_vl.interop import Qwen3VLCheckpointFormat, get_qwen3_vl_model_hub
from vembed_fs2.models.qwen3_vl.model import Qwen3VLModel
from vembed_fs2.models.qwen3_vl.processor import load_qwen3_vl_processor

__all__ = [
    "QWEN3_VL_FAMILY",
    "Qwen3VLCheckpointFormat",
    "Qwen3VLConfig",
    "Qwen3VLFactory",
    "Qwen3VLModel",
    "VisionConfig",
    "create_qwen3_vl_model",
    "get_qwen3_vl_model_hub",
    "register_qwen3_vl",
]


def register_qwen3_vl(container: DependencyContainer) -> None:
    """Register the family, its architectures and its format."""
    register_family(
        container,
        QWEN3_VL_FAMILY,
        kls=Qwen3VLModel,
        config_kls=Qwen3VLConfig,
        factory=create_qwen3_vl_model,
        checkpoint_format=Qwen3VLCheckpointFormat(),
        processor=load_qwen3_vl_processor,
        supports_packed=True,
        supports_tensor_parallel=True,
    )
    register_qwen3_vl_archs(container)

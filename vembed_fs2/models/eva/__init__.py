"""EVA-CLIP: CLIP with the image Transformers of EVA and EVA-02."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.models.eva.archs import register_eva_archs
from vembed_fs2.models.eva.config import EVA_FAMILY, EvaConfig, EvaVisionConfig
from vembed_fs2.models.eva.factory import EvaFactory, create_eva_model
from vembed_fs2.models.eva.interop import EVA_FORMAT, get_eva_model_hub
from vembed_fs2.models.eva.model import EvaModel
from vembed_fs2.models.eva.open_clip import OPEN_CLIP
from vembed_fs2.models.family import register_family

__all__ = [
    "EVA_FAMILY",
    "EVA_FORMAT",
    "EvaConfig",
    "EvaFactory",
    "EvaModel",
    "EvaVisionConfig",
    "create_eva_model",
    "get_eva_model_hub",
    "register_eva",
]


def register_eva(container: DependencyContainer) -> None:
    """Register the family, its architectures and its formats."""
    register_family(
        container,
        EVA_FAMILY,
        kls=EvaModel,
        config_kls=EvaConfig,
        factory=create_eva_model,
        checkpoint_format=EVA_FORMAT,
        dialects={"open_clip": OPEN_CLIP},
        supports_tensor_parallel=True,
    )
    register_eva_archs(container)

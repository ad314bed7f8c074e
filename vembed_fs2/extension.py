"""The function that fairseq2 calls at start-up: everything that the package adds to it."""

from __future__ import annotations

from fairseq2.composition import register_package_assets
from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.interop.layouts import register_layouts
from vembed_fs2.models.auto import register_auto
from vembed_fs2.models.bert import register_bert
from vembed_fs2.models.clip import register_clip
from vembed_fs2.models.composed import register_composed
from vembed_fs2.models.eva import register_eva
from vembed_fs2.models.modernbert import register_modernbert
from vembed_fs2.models.qwen3 import register_qwen3
from vembed_fs2.models.qwen3_vl import register_qwen3_vl
from vembed_fs2.models.siglip import register_siglip
from vembed_fs2.models.vit import register_vit
from vembed_fs2.recipes.metrics import register_metrics


def setup_vembed(container: DependencyContainer) -> None:
    """Register the layouts, the model families, the asset cards and the recipe components."""
    register_metrics(container)
    register_package_assets(container, "vembed_fs2.assets.cards")

    register_layouts(container)

    register_clip(container)
    register_vit(container)
    register_bert(container)
    register_siglip(container)
    register_modernbert(container)
    register_qwen3(container)
    register_qwen3_vl(container)
    register_composed(container)
    register_eva(container)
    register_auto(container)

"""The function that fairseq2 calls at start-up: everything that the package adds to it."""

from __future__ import annotations

from fairseq2.composition import register_package_assets
from fairseq2.runtime.dependency import DependencyContainer


def setup_vembed(container: DependencyContainer) -> None:
    """Register the model families, the asset cards and the recipe components."""
    register_package_assets(container, "vembed_fs2.assets.cards")

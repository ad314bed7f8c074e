"""The function that fairseq2 calls at start-up."""

from __future__ import annotations

from fairseq2.composition import register_package_assets
from fairseq2.runtime.dependency import DependencyContainer

from vembed_toy_plugin.bag import register_toy_bag
from vembed_toy_plugin.clip import register_clip_archs


def setup_toy(container: DependencyContainer) -> None:
    register_package_assets(container, "vembed_toy_plugin.cards")
    register_clip_archs(container)
    register_toy_bag(container)

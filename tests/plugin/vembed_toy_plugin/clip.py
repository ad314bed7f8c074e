"""An architecture of the CLIP family."""

from __future__ import annotations

from fairseq2.runtime.dependency import DependencyContainer, DependencyResolver

from vembed_fs2.models.archs import ArchRegistrar
from vembed_fs2.models.clip import ClipConfig


def register_clip_archs(container: DependencyContainer) -> None:
    arch = ArchRegistrar(container, ClipConfig)

    @arch("toy_digits", advanced=True)
    def toy_digits(resolver: DependencyResolver) -> ClipConfig:
        """``tiny`` with one layer in each tower, and with the special tokens of the digits' tokenizer."""
        config = resolver.resolve(ClipConfig, key="tiny")
        config.text.num_layers = 1
        config.vision.num_layers = 1
        config.text.bos_idx = 2
        config.text.eos_idx = 3
        return config

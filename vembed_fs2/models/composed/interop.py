"""Composed models in folders, and the checkpoints that their encoders come from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, final

from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from typing_extensions import override

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.formats.key_map import KeyMap
from vembed_fs2.models.composed.config import COMPOSED_FAMILY, ComposedConfig
from vembed_fs2.models.composed.model import ComposedModel
from vembed_fs2.models.family import CheckpointFormat, PlainCheckpointFormat


@final
class ComposedCheckpointFormat(CheckpointFormat):
    """A folder with both encoders: their configurations in ``config.json``, their tensors by our names."""

    model_types = (COMPOSED_FAMILY,)

    def __init__(self) -> None:
        self._plain = PlainCheckpointFormat(COMPOSED_FAMILY, ComposedConfig)

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> ComposedConfig:
        return self._plain.from_hf_config(hf_config, head=head, keys=keys)

    @override
    def key_map(self, config: object) -> KeyMap:
        return self._plain.key_map(config)

    @override
    def has_our_names(self, keys: Collection[str], config: object) -> bool:
        return True

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        # The places that the encoders came from mean nothing elsewhere, and may be private.
        return self._plain.to_hg_config(forget_sources(cast_config_type(config, ComposedConfig)))

    @override
    def config_fields(self, config: object) -> Mapping[str, object]:
        return self._plain.config_fields(config)

    @override
    def describe_config(self, config: object) -> dict[str, Any]:
        return self._plain.describe_config(forget_sources(cast_config_type(config, ComposedConfig)))


def forget_sources(config: ComposedConfig) -> ComposedConfig:
    """Return the configuration of a model that has its weights: without where they first came from."""
    text, image = (replace(tower, path=None, name=None, arch=None) for tower in (config.text, config.image))
    return replace(config, text=text, image=image)


get_composed_model_hub = ModelHubAccessor(COMPOSED_FAMILY, kls=ComposedModel, config_kls=ComposedConfig)

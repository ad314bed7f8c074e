"""The configuration of composed models."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import DependencyLookup
from fairseq2.utils.structured import StandardValueConverter
from fairseq2.utils.validation import ValidationResult

from vembed_fs2.embedding.model import EmbeddingModelConfig
from vembed_fs2.errors import did_you_mean
from vembed_fs2.models.common.checks import (
    check_activation,
    check_choice,
    check_positive,
    check_probabilities,
    to_result,
)
from vembed_fs2.models.family import FamilyFactory
from vembed_fs2.resolver import get_resolver

COMPOSED_FAMILY: Final = "vembed_composed"

ProjectionKind: TypeAlias = Literal["linear", "mlp", "none"]

Freeze: TypeAlias = Literal["none", "all", "all_but_last"]


@dataclass(kw_only=True)
class ProjectionConfig:
    """What takes the embeddings of an encoder to the shared space."""

    kind: ProjectionKind = "linear"
    """A linear map, one with a hidden layer before it (``mlp``), or nothing."""

    hidden_dim: int | None = None
    """The size of the hidden layer of ``mlp``; the size of its inputs if ``None``."""

    activation: str = "gelu"
    """The activation function of the hidden layer, by transformers' name."""

    bias: bool = False
    """If ``True``, adds biases."""

    dropout_p: float = 0.0
    """The dropout probability on the inputs of the last linear map."""

    def validate(self) -> ValidationResult:
        return to_result(
            check_choice(self, "kind", get_args(ProjectionKind)),
            self._kind_errors(),
            check_positive(self, "hidden_dim"),
            check_probabilities(self, "dropout_p"),
            check_activation(self),
        )

    def _kind_errors(self) -> Iterator[str]:
        if self.hidden_dim is not None and self.kind != "mlp":
            yield f"`hidden_dim` is set, but a projection of kind '{self.kind}' has no hidden layer."

        if self.kind == "none" and (self.bias or self.dropout_p):
            yield "`bias` or `dropout_p` is set, but the kind 'none' is no projection."


@dataclass(kw_only=True)
class TowerConfig:
    """An encoder of any family, and its projection."""

    path: Path | None = None
    """The Hugging Face or run folder that its initial weights come from. A trained model does not need it."""

    name: str | None = None
    """The card that its initial weights come from, if it is not a folder."""

    family: str = ""
    """The family of the encoder."""

    arch: str | None = None
    """The architecture that ``config`` starts from, for random weights."""

    config: object = None
    """The configuration of the encoder, of the family's own class; the configuration of ``arch`` if ``None``."""

    freeze: Freeze = "none"
    """
    Which parameters of the encoder keep their values in training: none, all,
    or with ``all_but_last`` all layers before the last
    ``trained_layers``, and of what comes before them.
    """

    trained_layers: int | None = None
    """The number of last layers that ``all_but_last`` trains."""

    frozen_params: Sequence[str] = field(default_factory=list)
    """Regular expressions: more parameters of the encoder that are frozen, by the beginnings of their names."""

    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    """What follows the encoder."""

    def __post_init__(self) -> None:
        # A file holds nested keys; only the family knows their class.
        family = maybe_get_family(self.family)
        if family is None:
            return

        if self.config is None:
            self.config = family.maybe_get_arch_config(self.arch) if self.arch is not None else family.config_kls()
        elif isinstance(self.config, Mapping):
            self.config = StandardValueConverter().structure(self.config, family.config_kls)

    @property
    def source(self) -> str | Path | None:
        """The source of the initial weights; ``None`` if they are random."""
        return self.path if self.path is not None else self.name

    def validate(self) -> ValidationResult:
        return to_result(self._encoder_errors(), self._freeze_errors())

    def _encoder_errors(self) -> Iterator[str]:
        if self.name is not None and self.path is not None:
            yield "`name` and `path` must not be specified at the same time."

        if not self.family:
            given = "`path` (a folder), `name` (a card) or `family`" if self.source is None else "`family`"
            yield f"{given} must be specified."
            return

        family = maybe_get_family(self.family)
        if family is None:
            yield unknown_family("family", self.family)
        elif self.config is None:
            archs = sorted(family.get_archs())
            hint = did_you_mean(str(self.arch), archs) or f" Known: {', '.join(archs)}."
            yield f"`arch` '{self.arch}' is not known.{hint}"
        elif not isinstance(self.config, family.config_kls):
            yield f"`config` must be of type `{family.config_kls.__name__}`, but is {self.config!r} instead."
        elif getattr(self.config, "trust_remote_code", False):
            yield f"`config.trust_remote_code` must not be set. {NO_CODE}"

    def _freeze_errors(self) -> Iterator[str]:
        yield from check_choice(self, "freeze", get_args(Freeze))

        if self.freeze == "all_but_last" and self.trained_layers is None:
            yield "`trained_layers` must be set for `freeze` 'all_but_last'."
        if self.freeze != "all_but_last" and self.trained_layers is not None:
            yield f"`trained_layers` is set, but `freeze` is '{self.freeze}' and not 'all_but_last'."

        yield from check_positive(self, "trained_layers")

        if self.frozen_params and self.freeze == "all":
            yield "`frozen_params` is set, but `freeze` is 'all'."

        for pattern in self.frozen_params:
            try:
                re.compile(pattern)
            except re.error as ex:
                yield f"`frozen_params`: '{pattern}' is not a valid regular expression: {ex}."


@dataclass(kw_only=True)
class ComposedConfig(EmbeddingModelConfig):
    """The configuration of a composed model."""

    text: TowerConfig = field(default_factory=TowerConfig)
    """The text encoder."""

    image: TowerConfig = field(default_factory=TowerConfig)
    """The image encoder."""

    embedding_dim: int = 512
    """The size of embeddings."""

    normalize: bool | None = None
    """Whether the model ends with a normalisation; see :class:`~vembed_fs2.embedding.head.HeadConfig`."""

    def validate(self) -> ValidationResult:
        return to_result(check_positive(self, "embedding_dim"))


NO_CODE: Final = "Composed models do not support encoders with code, because their folders could not be loaded again."


def maybe_get_family(name: str) -> ModelFamily | None:
    """Return the family of embedding models of that name, if there is one."""
    resolver = get_resolver() if name else None
    if resolver is None or resolver.maybe_resolve(FamilyFactory, key=name) is None:
        return None
    return resolver.resolve(ModelFamily, key=name)


def unknown_family(where: str, name: str) -> str:
    """Say that there is no family of embedding models of that name."""
    known = sorted(str(key) for key in DependencyLookup(get_resolver(), FamilyFactory).iter_keys())
    hint = did_you_mean(name, known) or f" Known: {', '.join(known)}."
    return f"`{where}` '{name}' is not a family of embedding models.{hint}"

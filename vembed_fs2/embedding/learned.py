"""What an objective learns besides the encoder: a temperature, a bias, a projection.

An objective declares its parts, a model holds them, embeddings carry them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LearnedPart:
    """A parameter that a model holds for an objective."""

    name: str
    """What the objective and the checkpoint call it. No module of a model may be called so."""

    shape: Sequence[int] = (1,)
    """Not a scalar, because FSDP2 cannot shard scalars."""

    mean: float = 0.0
    """The mean of the initial values."""

    std: float = 0.0
    """Their standard deviation. They are drawn from a normal distribution, the same ones each time."""

    max: float | None = None
    """If set, greater values are cut to it before each step."""

    per_dimension: bool = False
    """If ``True``, the last size is the embeddings', and an objective on their first dimensions sees the beginning."""

    is_trained: bool = True
    """If ``False``, it keeps its value whatever the objective learns."""

    def __post_init__(self) -> None:
        """:raises ValueError: the name or the shape is not valid."""
        object.__setattr__(self, "shape", tuple(self.shape))  # A file holds a list.

        if not self.name.isidentifier():
            raise ValueError(f"The name of a learned part must be letters, digits and `_`, but is '{self.name}'.")
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"The learned part '{self.name}' must have at least one size, but has {self.shape}.")

    def initial(self) -> Tensor:
        """Return the initial values. *Shape:* ``shape``."""
        if self.std == 0.0:
            return torch.full(self.shape, self.mean)
        generator = torch.Generator("cpu").manual_seed(0)
        return torch.randn(self.shape, generator=generator, device="cpu") * self.std + self.mean


_in_float32: Final = ContextVar("in_float32", default=False)


@contextmanager
def learned_in_float32() -> Iterator[None]:
    """Models that are created meanwhile hold what objectives learn in float32, whatever the type of their weights.

    Half precision rounds a log temperature of 4.6 to steps of 1/32. Not for training: FSDP2 shards no group of
    parameters of several types.
    """
    token = _in_float32.set(True)
    try:
        yield
    finally:
        _in_float32.reset(token)


def learned_dtype(weights: torch.dtype) -> torch.dtype:
    """The type of learned parts beside weights of a type."""
    return torch.promote_types(weights, torch.float32) if _in_float32.get() else weights


LOGIT_SCALE: Final = "logit_scale"
"""Log of the inverse temperature. CLIP and SigLIP have it as well."""

LOGIT_BIAS: Final = "logit_bias"
"""Bias of the logits. SigLIP has it as well."""

TEACHER_PROJECTION: Final = "teacher_projection"
"""Takes embeddings to the size of a teacher's. *Shape:* ``[T, D]``."""


def teacher_projection(teacher_dim: int, embedding_dim: int) -> LearnedPart:
    """Return the part that takes embeddings to the size of a teacher's, and keeps lengths on average."""
    return LearnedPart(
        name=TEACHER_PROJECTION, shape=(teacher_dim, embedding_dim), std=teacher_dim**-0.5, per_dimension=True
    )


@dataclass(kw_only=True)
class EmbeddingModelConfig:
    """Base of the configurations of families whose models can hold what an objective learns."""

    logit_scale_init: float | None = None
    """The log inverse temperature to start from; the model has none if ``None``."""

    logit_bias_init: float | None = None
    """The bias of the logits to start from; the model has none if ``None``."""

    teacher_dim: int | None = None
    """The size of a teacher's embeddings that the model's are projected to; it has no projection if ``None``."""

    learned: Sequence[LearnedPart] | None = None
    """What else an objective learns. Training sets it; exported folders do not have it."""

    extra_fields: dict[str, dict[str, object]] = field(default_factory=dict)
    """
    The fields of a folder's configuration that have no counterpart here, by the
    name of their file (``config.json``). An exported folder has them again.
    """

    def learned_parts(self, embedding_dim: int) -> Sequence[LearnedPart]:
        """Return what the model holds for objectives."""
        parts = []
        for name, init in ((LOGIT_SCALE, self.logit_scale_init), (LOGIT_BIAS, self.logit_bias_init)):
            if init is not None:
                parts.append(LearnedPart(name=name, mean=init))

        if self.teacher_dim is not None:
            parts.append(teacher_projection(self.teacher_dim, embedding_dim))

        return [*parts, *(self.learned or ())]


def describe_changes(config: object, parts: Iterable[LearnedPart]) -> dict[str, object]:
    """Return the fields of a configuration that must change for its model to hold all that an objective learns.

    What the model has goes on from its values. What another objective learned
    stays, and is not trained; but a projection goes with its teacher.

    :param config: an :class:`EmbeddingModelConfig`, or any other if the model holds nothing.
    """
    wanted: dict[str, object] = {"teacher_dim": None}
    held = {part.name: part for part in getattr(config, "learned", None) or ()}

    others = dict(held)
    for part in parts:
        if part.name in (LOGIT_SCALE, LOGIT_BIAS):
            if getattr(config, f"{part.name}_init", None) is None:
                wanted[f"{part.name}_init"] = part.mean
        elif part.name == TEACHER_PROJECTION:
            wanted["teacher_dim"] = part.shape[0]
        else:
            others[part.name] = part

    changes = {name: value for name, value in wanted.items() if getattr(config, name, None) != value}
    if others != held:
        changes["learned"] = [{**asdict(part), "shape": list(part.shape)} for part in others.values()]

    return changes


def merge_parts(declared: Iterable[LearnedPart]) -> list[LearnedPart]:
    """Return each part once.

    :raises ValueError: two of a name are not the same.
    """
    merged: dict[str, LearnedPart] = {}
    for part in declared:
        other = merged.setdefault(part.name, part)
        if part != other:
            pairs = ((field, getattr(other, field), value) for field, value in asdict(part).items())
            differ = ", ".join(f"`{field}` {_show(a)} and {_show(b)}" for field, a, b in pairs if a != b)
            raise ValueError(
                f"All objectives share the model's learned `{part.name}`, but they declare it differently: {differ}."
                " Give them the same values."
            )

    return list(merged.values())


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def first_dimensions(parts: Mapping[str, Tensor], declared: Iterable[LearnedPart], dim: int) -> dict[str, Tensor]:
    """Cut the parts that have a value per dimension to the first ``dim`` dimensions of embeddings."""
    cut = {part.name for part in declared if part.per_dimension}
    return {name: tensor[..., :dim] if name in cut else tensor for name, tensor in parts.items()}

"""Matryoshka: embeddings whose first dimensions are embeddings as well.

Kusupati et al., "Matryoshka Representation Learning", 2022,
https://arxiv.org/abs/2205.13147.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vembed_fs2.losses.common import LossInput, LossOutput, Objective
from vembed_fs2.losses.nested import Composite, LossSpec, Part, nested_errors


@dataclass(kw_only=True)
class MatryoshkaConfig:
    loss: LossSpec = field(default_factory=lambda: LossSpec(name="infonce"))
    """The objective that embeddings of each size are trained with."""

    dims: Sequence[int] = ()
    """The sizes, in any order: so many leading dimensions are kept."""

    weights: Sequence[float] = ()
    """How much each size counts; 1 each, if none are given."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        return [*_size_errors(self.dims, self.weights), *nested_errors(self.loss, "loss")]


class Matryoshka(Composite):
    r"""An objective on leading dimensions of the embeddings.

    .. math:: \mathcal{L} = \sum_k w_k \, \mathcal{L}_{\text{inner}}(x_{1..d_k})

    Of multi-vector embeddings, each vector is truncated. A teacher's embeddings
    are not. The metrics describe the largest size, and the loss of each
    (``loss@64``).
    """

    def __init__(self, loss: Objective, dims: Sequence[int], weights: Sequence[float] = ()) -> None:
        """
        :param loss: computed for each size; it gathers the rows of other ranks itself.
        :param dims: how many leading dimensions to keep.
        :param weights: how much each counts; 1 each, if none are given.
        :raises ValueError: ``dims`` or ``weights`` are not valid.
        """
        if errors := _size_errors(dims, weights):
            raise ValueError(" ".join(errors))
        self._dims = list(dims)
        super().__init__([Part(loss, weight, dim) for dim, weight in zip(dims, weights or [1.0] * len(dims))])

    def compute(self, inputs: LossInput) -> LossOutput:
        if errors := self.dim_errors(inputs.query.size(-1)):
            raise ValueError(" ".join(errors))

        total, outputs = self.compute_parts(inputs)
        metrics = dict(outputs[self._dims.index(max(self._dims))].metrics)
        metrics |= {f"loss@{dim}": output.loss for dim, output in zip(self._dims, outputs)}

        return LossOutput(total, metrics)


def _size_errors(dims: Sequence[int], weights: Sequence[float]) -> list[str]:
    errors = []
    if not dims or len(set(dims)) != len(dims) or min(dims) < 1:
        errors.append(f"`dims` must hold different numbers of dimensions, each at least 1, but is {list(dims)}.")
    if weights and len(weights) != len(dims):
        errors.append(f"`weights` must have an entry for each of the {len(dims)} `dims`, but has {len(weights)}.")
    if not all(0.0 < w < math.inf for w in weights):
        errors.append(f"`weights` must be positive, but are {list(weights)}.")

    return errors

"""Several objectives at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vembed_fs2.losses.common import LossInput, LossOutput, Objective
from vembed_fs2.losses.nested import Composite, LossSpec, Part, nested_errors


@dataclass(kw_only=True)
class WeightedLossSpec(LossSpec):
    """One of several objectives."""

    weight: float = 1.0
    """How much it counts."""


@dataclass(kw_only=True)
class CombinedConfig:
    losses: Sequence[WeightedLossSpec] = ()
    """The objectives. The metrics of the first one keep their names."""

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one sentence each."""
        errors = [] if self.losses else ["`losses` must hold at least one objective."]
        for idx, spec in enumerate(self.losses):
            if not 0.0 < spec.weight < math.inf:
                errors.append(f"`losses[{idx}].weight` must be positive, but is {spec.weight}.")
            errors += nested_errors(spec, f"losses[{idx}]")
        return errors


class Combined(Composite):
    r"""A weighted sum of objectives on the same embeddings.

    .. math:: \mathcal{L} = \sum_k w_k \, \mathcal{L}_k

    The metrics of the first one keep their names; the others' are
    prefixed by theirs (``spread/loss``). ``<name>/loss`` is the loss of each,
    without its weight.
    """

    def __init__(self, losses: Mapping[str, Objective], weights: Mapping[str, float] | None = None) -> None:
        """
        :param losses: the objectives, by the names that their metrics are to have.
        :param weights: how much each counts; 1 if there is none.
        :raises ValueError: there is no objective, or a weight is not valid.
        """
        weights = weights or {}

        if not losses:
            raise ValueError("`losses` must hold at least one objective.")

        for name, weight in weights.items():
            if name not in losses or not 0.0 < weight < math.inf:
                raise ValueError(f"`weights` must hold positive numbers for {', '.join(losses)}, but is {weights}.")

        self._names = list(losses)
        super().__init__([Part(loss, weights.get(name, 1.0)) for name, loss in losses.items()])

    def compute(self, inputs: LossInput) -> LossOutput:
        total, outputs = self.compute_parts(inputs)
        metrics: dict[str, Tensor] = dict(outputs[0].metrics)
        for name, output in zip(self._names, outputs):
            metrics[f"{name}/loss"] = output.loss
            if name != self._names[0]:
                metrics |= {f"{name}/{key}": value for key, value in output.metrics.items()}

        return LossOutput(total, metrics)

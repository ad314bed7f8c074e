"""An objective that learns something: InfoNCE with a weight for each dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.learned import LearnedPart
from vembed_fs2.losses import InfoNCE, InfoNCEConfig, LossInput, LossOutput, Objective


@dataclass(kw_only=True)
class WeightedConfig:
    temperature: float = 0.1
    """The number that similarities are divided by."""

    def errors(self) -> list[str]:
        return InfoNCEConfig(temperature=self.temperature).errors()


class Weighted(Objective):
    def __init__(self, config: WeightedConfig | None = None, gather: RowGather | None = None) -> None:
        self._inner = InfoNCE(InfoNCEConfig(temperature=(config or WeightedConfig()).temperature), gather)

    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        return [LearnedPart(name="dimension_weights", shape=(embedding_dim,), mean=1.0, per_dimension=True)]

    def compute(self, inputs: LossInput) -> LossOutput:
        weights = inputs.get_part("dimension_weights").float()
        return self._inner.compute(replace(inputs, query=inputs.query * weights, document=inputs.document * weights))

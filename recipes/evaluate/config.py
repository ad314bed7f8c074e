"""The configuration of the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from fairseq2.recipe.config import CommonSection, GangSection
from fairseq2.utils.validation import ValidationResult

from vembed_fs2.dtypes import find_dtype
from vembed_fs2.errors import VembedError
from vembed_fs2.inference.quantize import Precision
from vembed_fs2.recipes.evaluate.settings import EvaluateSettings


@dataclass(kw_only=True)
class EvaluateConfig(EvaluateSettings):
    """The configuration of ``python -m vembed_fs2.recipes.evaluate``."""

    gang: GangSection = field(default_factory=lambda: GangSection())
    common: CommonSection = field(default_factory=lambda: CommonSection(no_sweep_dir=True))

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if not self.model:
            result.add_error("`model` must name a model.")
        if self.ks is not None and (not self.ks or min(self.ks) < 1):
            result.add_error(f"`ks` must be whole numbers of at least 1, but is {list(self.ks)} instead.")

        for name, low in (("batch_size", 1), ("max_length", 3), ("truncate_dim", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                result.add_error(f"`{name}` must be greater than or equal to {low}, but is {value} instead.")

        if self.precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            result.add_error(f"`precision` must be one of {known}, but is '{self.precision}' instead.")
        try:
            find_dtype(self.dtype)
        except VembedError as ex:
            result.add_error(str(ex))

        if self.gang.tensor_parallel_size != 1:
            result.add_error("`gang.tensor_parallel_size` must be 1: each process holds the whole model.")

        return result

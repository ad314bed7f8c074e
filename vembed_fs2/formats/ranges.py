"""The ranges of a model's embeddings, which its folder keeps: between them, int8 and uint8 embeddings have 256 steps.

Shapes: D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json, write_json

RANGES_FILE: Final = "vembed_ranges.json"
"""The file with the ranges, in a folder that we wrote. Other libraries do not look at it."""

Scaling: TypeAlias = Literal["none", "model", "unit"]
"""
How vectors are scaled: not at all; by the model's own normalisation, before they
are truncated; or to unit length, as they are returned.
"""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The smallest and the largest value of each dimension, of embeddings of one form."""

    values: NDArray[Any]
    """*Shape:* ``[2, D]``: the smallest values, and the largest."""

    scaling: Scaling
    """How the embeddings were scaled."""

    def fit(self, scaling: Scaling, dim: int) -> NDArray[Any] | None:
        """Return the ranges of embeddings of ``dim`` dimensions; ``None`` if these are of another form. ``[2, dim]``.

        What is truncated last has the ranges of its first dimensions.
        """
        size = self.values.shape[1]
        if (scaling, dim) == (self.scaling, size):
            return self.values

        is_prefix = scaling == self.scaling != "unit" or (scaling, self.scaling) == ("model", "unit")
        return self.values[:, :dim] if is_prefix and dim <= size else None


def write_ranges(ranges: Ranges, folder: Path) -> None:
    """Write ranges to a file of ``folder``."""
    low, high = ranges.values.tolist()
    write_json(folder / RANGES_FILE, {"scaling": ranges.scaling, "low": low, "high": high})


def read_ranges(folder: Path, embedding_dim: int) -> Ranges | None:
    """Read the ranges that :func:`write_ranges` wrote; ``None`` if there are none.

    :param embedding_dim: the size of the model's embeddings.
    :raises ModelLoadError: the file is broken, or does not fit the model.
    """
    file = folder / RANGES_FILE
    if not file.is_file():
        return None

    content = read_json(file)
    try:
        values = np.array([content["low"], content["high"]], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        raise ModelLoadError(f"{file} must hold lists of numbers, `low` and `high`, of the same length.") from None

    if content.get("scaling") not in get_args(Scaling):
        raise ModelLoadError(f"{file}: `scaling` must be one of {', '.join(get_args(Scaling))}.")
    if problem := find_problem(values):
        raise ModelLoadError(f"{file} {problem}.")
    if values.shape[1] > embedding_dim:
        raise ModelLoadError(
            f"{file} has {values.shape[1]} dimensions, but the model's embeddings have {embedding_dim}."
        )

    return Ranges(values=values, scaling=content["scaling"])


def find_problem(values: NDArray[Any]) -> str | None:
    """Say what is wrong with ranges, after the name of what holds them; ``None`` if nothing is."""
    if values.ndim != 2 or values.shape[0] != 2 or values.shape[1] == 0:
        return f"must be of shape [2, D], the smallest and the largest value of each dimension, not {values.shape}"
    if not np.isfinite(values).all():
        return "must hold finite numbers only"
    if (values[0] > values[1]).any():
        return f"has a smallest value above the largest, in dimension {int(np.argmax(values[0] > values[1]))}"
    return None

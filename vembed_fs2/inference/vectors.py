"""Vectors as users get them: truncated, of unit length, quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.embedding.model import Embeddings

Array: TypeAlias = NDArray[Any]

Precision: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]


@dataclass(frozen=True)
class Finish:
    """Makes float32 vectors of a model's output."""

    dim: int
    """The number of leading dimensions that are kept."""

    unit: bool
    """Whether vectors are scaled to unit length."""

    on_cpu: bool
    """Whether they leave the device at once, because those of all inputs may not fit there."""

    def __call__(self, embeddings: Embeddings) -> Embeddings:
        values = embeddings.values.float()[..., : self.dim]
        if self.unit:
            values = normalize(values, dim=-1)

        mask = embeddings.mask
        if values.ndim > 2 and mask is None:
            mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)

        if self.on_cpu:
            values, mask = values.cpu(), None if mask is None else mask.cpu()
        return Embeddings(values, mask)


def split_vectors(embeddings: Embeddings) -> list[Tensor]:
    """Return the vectors of each row: ``[D]``, or ``[L_i, D]`` of multi-vector models."""
    values, mask = embeddings.values, embeddings.mask
    if mask is None:
        return list(values)
    return list(torch.split(values[mask], mask.sum(1).tolist()))


def quantize(values: Array, precision: Precision) -> Array:
    """Quantize float embeddings ``[N, D]`` as sentence-transformers' ``quantize_embeddings`` does.

    ``int8`` and ``uint8`` divide the range of each dimension in ``values`` into
    255 steps; ``binary`` and ``ubinary`` keep signs, eight to a byte.
    """
    if precision in ("binary", "ubinary"):
        packed: Array = np.packbits(values > 0, axis=-1)
        return (packed - np.uint8(128)).view(np.int8) if precision == "binary" else packed

    if precision == "float32" or not len(values):
        return values.astype(precision)

    low, high = values.min(axis=0, keepdims=True), values.max(axis=0, keepdims=True)
    steps = np.where(high > low, (high - low) / 255, np.float32(1))
    buckets: Array = np.clip(np.floor((values - low) / steps), 0, 255)
    return buckets.astype(np.uint8) if precision == "uint8" else (buckets - 128).astype(np.int8)

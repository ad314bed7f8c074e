"""Vectors as users ask for them: truncated, of unit length, quantized, as arrays or tensors.

Shapes: N inputs, n rows of a chunk, D kept dimensions, L_i vectors of an input of multi-vector models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.embedding.model import EmbeddingModel, Embeddings
from vembed_fs2.errors import VembedError
from vembed_fs2.inference.encoder import Encoded

Array: TypeAlias = NDArray[Any]
"""Embeddings outside torch."""

Precision: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]
"""The numbers of embeddings: floats, one byte per dimension, or one bit, eight in a byte."""


@dataclass(frozen=True, kw_only=True)
class VectorOptions:
    """The form in which embeddings are returned."""

    dim: int
    """The number of leading dimensions that are kept."""

    unit: bool
    """Whether vectors are scaled to unit length."""

    precision: Precision
    """The numbers that are returned."""

    as_tensor: bool
    """Whether they stay tensors, on their device."""

    is_multi_vector: bool
    """Whether an input has several vectors."""

    @staticmethod
    def of(
        model: EmbeddingModel, truncate_dim: int | None, precision: Precision, unit: bool | None, as_tensor: bool
    ) -> VectorOptions:
        """Combine what the caller asks for with what the model says.

        :raises VembedError: an option is not valid.
        """
        is_dim = isinstance(truncate_dim, int) and 1 <= truncate_dim <= model.embedding_dim
        if truncate_dim is not None and not is_dim:
            raise VembedError(f"`truncate_dim` must be between 1 and {model.embedding_dim}, but is {truncate_dim!r}.")
        if precision not in get_args(Precision):
            raise VembedError(f"`precision` must be one of {', '.join(get_args(Precision))}, but is {precision!r}.")

        is_multi_vector = model.is_multi_vector
        if is_multi_vector and precision != "float32":
            raise VembedError(f"`precision` of a multi-vector model must be float32, but is {precision!r}.")

        return VectorOptions(
            dim=truncate_dim or model.embedding_dim,
            unit=model.normalize if unit is None else unit,
            precision=precision,
            as_tensor=as_tensor,
            is_multi_vector=is_multi_vector,
        )

    def finish(self, embeddings: Embeddings) -> Embeddings:
        """Truncate and scale the embeddings of a chunk."""
        values, mask = embeddings.values.float()[..., : self.dim], embeddings.mask
        if self.unit:
            values = normalize(values, dim=-1)

        # Vectors of all inputs may not fit on the device.
        if self.is_multi_vector and not self.as_tensor:
            values, mask = values.cpu(), None if mask is None else mask.cpu()

        return Embeddings(values, mask)

    def collect(self, encoded: Iterable[Encoded], num_rows: int, device: torch.device) -> Any:
        """Put the embeddings of all inputs in their order. *Returns:* ``[N, D]``, or a list of ``[L_i, D]``."""
        if self.is_multi_vector:
            vectors: list[Any] = [None] * num_rows
            for rows, embeddings in encoded:
                for row, value in zip(rows, self._split(embeddings)):
                    vectors[row] = value
            return vectors

        values = torch.empty(num_rows, self.dim, device=device)
        for rows, embeddings in encoded:
            values[torch.tensor(rows, device=device)] = embeddings.values

        return self._convert(values)

    def in_order(self, encoded: Iterable[Encoded]) -> Iterator[Any]:
        """Yield the embedding of one input after the other. *Returns:* ``[D]``, or ``[L_i, D]``, each."""
        ready: dict[int, Any] = {}
        position = 0

        for rows, embeddings in encoded:
            ready.update(zip(rows, self._split(embeddings)))
            while position in ready:
                yield ready.pop(position)
                position += 1

    def _split(self, embeddings: Embeddings) -> list[Any]:
        values, mask = embeddings.values, embeddings.mask
        if not self.is_multi_vector:
            return list(self._convert(values))

        if mask is None:
            mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)

        vectors = torch.split(values[mask], mask.sum(1).tolist())
        return [v if self.as_tensor else v.numpy() for v in vectors]

    def _convert(self, values: Tensor) -> Any:
        if self.precision != "float32":
            values = torch.from_numpy(quantize(values.cpu().numpy(), self.precision))
        return values if self.as_tensor else values.cpu().numpy()


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

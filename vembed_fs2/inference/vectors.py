"""Vectors as users ask for them: truncated, of unit length, quantized, as arrays or tensors.

Shapes: N inputs, n rows of a chunk, D kept dimensions, L_i vectors of an input of multi-vector models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.embedding.model import EmbeddingModel, Embeddings
from vembed_fs2.errors import VembedError
from vembed_fs2.formats.ranges import Ranges, Scaling
from vembed_fs2.inference.encoder import Encoded
from vembed_fs2.inference.quantize import Array as Array
from vembed_fs2.inference.quantize import Precision as Precision
from vembed_fs2.inference.quantize import check_precision, find_ranges, quantize


@dataclass(frozen=True, kw_only=True)
class VectorOptions:
    """The form in which embeddings are returned."""

    dim: int
    """The number of leading dimensions that are kept."""

    scaling: Scaling
    """How vectors are scaled."""

    precision: Precision
    """The numbers that are returned."""

    ranges: Array | None
    """The smallest and the largest value of each dimension, of ``int8`` and ``uint8``. *Shape:* ``[2, D]``."""

    as_tensor: bool
    """Whether they stay tensors, on their device."""

    is_multi_vector: bool
    """Whether an input has several vectors."""

    @staticmethod
    def of(
        model: EmbeddingModel,
        *,
        truncate_dim: int | None = None,
        precision: Precision | None = None,
        normalize: bool | None = None,
        raw: bool = False,
        ranges: object = None,
        kept_ranges: Ranges | None = None,
        as_tensor: bool = False,
    ) -> VectorOptions:
        """Combine what the caller asks for with what the model says.

        :param ranges: what the caller gives.
        :param kept_ranges: what the model has been calibrated to.
        :raises VembedError: an option is not valid.
        """
        is_dim = isinstance(truncate_dim, int) and 1 <= truncate_dim <= model.embedding_dim
        if truncate_dim is not None and not is_dim:
            raise VembedError(f"`truncate_dim` must be between 1 and {model.embedding_dim}, but is {truncate_dim!r}.")
        if raw and normalize:
            raise VembedError("`raw` and `normalize_embeddings` exclude each other: raw embeddings are not scaled.")

        precision = check_precision(precision or "float32")
        if model.is_multi_vector and precision != "float32":
            raise VembedError(f"`precision` of a multi-vector model must be float32, but is {precision!r}.")

        dim = truncate_dim or model.embedding_dim
        scaling: Scaling = "none" if raw else _find_scaling(model, dim, normalize)

        return VectorOptions(
            dim=dim,
            scaling=scaling,
            precision=precision,
            ranges=find_ranges(ranges, kept_ranges, precision, scaling, dim),
            as_tensor=as_tensor,
            is_multi_vector=model.is_multi_vector,
        )

    def finish(self, embeddings: Embeddings) -> Embeddings:
        """Truncate and scale the embeddings of a chunk."""
        values, mask = embeddings.values.float(), embeddings.mask
        if self.scaling == "model":
            values = normalize(values, dim=-1)

        values = values[..., : self.dim]
        if self.scaling == "unit":
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
            values = torch.from_numpy(quantize(values.cpu().numpy(), self.precision, self.ranges))
        return values if self.as_tensor else values.cpu().numpy()


def _find_scaling(model: EmbeddingModel, dim: int, normalize: bool | None) -> Scaling:
    """How vectors of ``dim`` dimensions are scaled, if the caller asks for ``normalize``.

    ``False`` takes no normalisation of the model's own away, as in sentence-transformers.
    """
    if normalize or (normalize is None and model.normalize and not model.has_normalization):
        return "unit"
    if not model.has_normalization or not model.normalize:
        return "none"
    return "unit" if dim == model.embedding_dim else "model"

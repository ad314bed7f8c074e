"""What the engine needs of a batch: rows that can be counted, priced, selected and appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Rows(Protocol):
    """A batch of rows. :class:`~vembed_fs2.models.embedding.EncoderBatch` is one."""

    def __len__(self) -> int: ...

    def costs(self) -> list[int]:
        """The tokens of each row."""

    def kinds(self) -> list[int]:
        """Rows of different kinds never share a chunk."""

    def select(self, rows: Sequence[int]) -> Any:
        """The given rows as the encoder takes them, trimmed to their own width."""

    @staticmethod
    def concat(batches: Sequence[Any]) -> Any:
        """Append batches."""


class DictRows:
    """Rows of a dict of tensors with a leading row dimension, as transformers' models take them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        sizes = {k: v.size(0) for k, v in tensors.items()}
        if not sizes or len(set(sizes.values())) != 1:
            raise ValueError(f"All tensors of a role must have the same number of rows, but have {sizes}.")
        self._tensors = dict(tensors)
        mask = self._tensors.get("attention_mask")
        # Padding is cut where it trails; padding on the left stays.
        trailing = mask is not None and not (mask[:, 1:] > mask[:, :-1]).any()
        self._lengths = mask.sum(1).tolist() if mask is not None and trailing else None
        self._width = mask.size(1) if mask is not None else 0

    def __len__(self) -> int:
        return next(iter(self._tensors.values())).size(0)

    def costs(self) -> list[int]:
        if self._lengths is not None:
            return [int(n) for n in self._lengths]
        return [max(self._width, 1)] * len(self)

    def kinds(self) -> list[int]:
        return [0] * len(self)

    def select(self, rows: Sequence[int]) -> dict[str, Tensor]:
        width = self._width if self._lengths is None else max(int(self._lengths[r]) for r in rows)
        return {k: self._trim(v[torch.as_tensor(rows, device=v.device)], width) for k, v in self._tensors.items()}

    @staticmethod
    def concat(batches: Sequence[DictRows]) -> DictRows:
        if len(batches) == 1:
            return batches[0]
        keys = batches[0]._tensors.keys()
        if any(b._tensors.keys() != keys for b in batches):
            raise ValueError("Roles that share an encoder must hold the same keys.")
        width = max(b._width for b in batches)
        return DictRows({k: torch.cat([b._padded(k, width) for b in batches]) for k in keys})

    def _padded(self, key: str, width: int) -> Tensor:
        tensor = self._tensors[key]
        if tensor.ndim > 1 and tensor.size(1) == self._width < width:
            padding = [0, 0] * (tensor.ndim - 2) + [0, width - self._width]
            return torch.nn.functional.pad(tensor, padding)
        return tensor

    def _trim(self, tensor: Tensor, width: int) -> Tensor:
        is_sequence = tensor.ndim > 1 and tensor.size(1) == self._width
        return tensor[:, :width] if is_sequence else tensor


def as_rows(role: Any) -> Rows:
    """Wrap one argument of a step."""
    if isinstance(role, Mapping):
        return DictRows(role)
    if isinstance(role, Rows):
        return role
    raise TypeError(f"A role must be an EncoderBatch or a dict of tensors, but is of type `{type(role)}`.")

"""What the engine needs of a batch: rows that can be counted, priced, selected and appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vembed_fs2.embedding.batch import Profile


@runtime_checkable
class Rows(Protocol):
    """A batch of rows. :class:`~vembed_fs2.embedding.batch.EncoderBatch` is one."""

    def __len__(self) -> int: ...

    def profile(self) -> Profile:
        """The kind of each row, from 0 to 7, and what it costs to encode."""

    def select(self, rows: Sequence[int]) -> Any:
        """The given rows as the encoder takes them, trimmed to their own width."""

    @staticmethod
    def concat(batches: Sequence[Any]) -> Any:
        """Append batches."""

    def cut(self) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """Cut the graph that made the inputs.

        :returns: the same rows, and each tensor that needs a gradient with the leaf that takes its place.
        """


class DictRows:
    """Rows of a dict of tensors with a leading row dimension, as transformers' models take them.

    Lengths come from ``attention_mask``, of shape ``[N, L]``, in which every value
    but 0 marks a token. Padding is cut where it trails; padding on the
    left stays, because positions may count it. Nothing is cut by a mask that is
    added to attention scores (0 for tokens, negative for padding).
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                raise TypeError(f"`{name}` of a role must be a tensor with a row dimension, but is {tensor!r}.")

        sizes = {k: v.size(0) for k, v in tensors.items()}
        if not sizes or len(set(sizes.values())) != 1:
            raise ValueError(f"All tensors of a role must have the same number of rows, but have {sizes}.")

        self._tensors = dict(tensors)

        mask = self._tensors.get("attention_mask")
        self._shape: torch.Size | None = None
        self._lengths: list[int] | None = None
        if mask is not None and mask.ndim == 2:
            self._shape = mask.shape
            is_token = _tokens_of(mask)
            if is_token is not None and not (is_token[:, 1:] & ~is_token[:, :-1]).any():
                self._lengths = [int(n) for n in is_token.sum(1).tolist()]

    def __len__(self) -> int:
        return next(iter(self._tensors.values())).size(0)

    def profile(self) -> Profile:
        return Profile([0] * len(self), self._tokens_per_row(), [0] * len(self))

    def _tokens_per_row(self) -> list[int]:
        if self._lengths is not None:
            return [max(n, 1) for n in self._lengths]

        # A mask of pairs of tokens, for example [N, L, L], does not tell the width.
        found = (self._tensors.get(name) for name in ("attention_mask", "input_ids"))
        width = next((t.size(1) for t in found if t is not None and t.ndim == 2), 1)
        return [width] * len(self)

    def select(self, rows: Sequence[int]) -> dict[str, Tensor]:
        chunk = {k: v[torch.as_tensor(rows, device=v.device)] for k, v in self._tensors.items()}
        if self._lengths is not None:
            width = max(1, *(self._lengths[r] for r in rows))
            chunk = {k: v[:, :width] if self._is_sequence(self._tensors[k]) else v for k, v in chunk.items()}
        return chunk

    def cut(self) -> tuple[DictRows, list[tuple[Tensor, Tensor]]]:
        leaves = {name: t.detach().requires_grad_() for name, t in self._tensors.items() if t.requires_grad}
        if not leaves:
            return self, []
        return DictRows({**self._tensors, **leaves}), [(self._tensors[name], leaf) for name, leaf in leaves.items()]

    @staticmethod
    def concat(batches: Sequence[DictRows]) -> DictRows | SeparateRows:
        if not _fit(batches):
            return SeparateRows(batches)

        width = max(b._shape[1] if b._shape is not None else 0 for b in batches)
        names = batches[0]._tensors
        return DictRows({name: torch.cat([b._padded(name, width) for b in batches]) for name in names})

    def _is_trailing(self) -> bool:
        """Whether there is padding, all of it on the right."""
        return self._lengths is not None and self._shape is not None and min(self._lengths, default=0) < self._shape[1]

    def _shapes(self) -> dict[str, Any]:
        """The shape of a row of each tensor; sequences without their width."""
        return {
            name: (tensor.dtype, tensor.shape[2 if self._is_sequence(tensor) else 1 :], self._is_sequence(tensor))
            for name, tensor in self._tensors.items()
        }

    def _is_sequence(self, tensor: Tensor) -> bool:
        """Whether the second dimension counts tokens, as in ids, masks and token states, but not in pixels."""
        if self._shape is None or tensor.shape[:2] != self._shape:
            return False
        is_mask = tensor is self._tensors["attention_mask"]
        return is_mask or tensor.ndim == 3 or (tensor.ndim == 2 and not tensor.is_floating_point())

    def _padded(self, name: str, width: int) -> Tensor:
        tensor = self._tensors[name]
        if self._is_sequence(tensor) and tensor.size(1) < width:
            return torch.nn.functional.pad(tensor, [0, 0] * (tensor.ndim - 2) + [0, width - tensor.size(1)])
        return tensor


def _tokens_of(mask: Tensor) -> Tensor | None:
    """Return True for the tokens of an attention mask, or ``None`` if it is one that is added to attention scores."""
    if mask.dtype == torch.bool:
        return mask

    # If nothing is masked, such a mask holds zeros alone.
    is_added = not (mask >= 0).all() or (mask.is_floating_point() and not mask.any())
    return None if is_added else mask != 0


class SeparateRows:
    """Rows of dicts that do not fit together. Each dict is of a kind of its own, so they never share a chunk."""

    def __init__(self, parts: Sequence[DictRows]) -> None:
        self._parts = parts
        self._members = [(part, row) for part, rows in enumerate(parts) for row in range(len(rows))]

    def __len__(self) -> int:
        return len(self._members)

    def profile(self) -> Profile:
        tokens = [n for part in self._parts for n in part.profile().tokens]
        return Profile([part for part, _ in self._members], tokens, [0] * len(self))

    def select(self, rows: Sequence[int]) -> dict[str, Tensor]:
        part = self._members[rows[0]][0]
        return self._parts[part].select([self._members[r][1] for r in rows])


def _fit(batches: Sequence[DictRows]) -> bool:
    """Whether rows of all batches can share a chunk without changing what an encoder makes of them."""
    if any(b._shapes() != batches[0]._shapes() for b in batches):
        return False
    if len({b._shape[1] if b._shape is not None else 0 for b in batches}) == 1:
        return True

    # Widths differ. Extra padding on the right is harmless; with left or no padding a model may read the last
    # position as the last token.
    return all(b._lengths is not None for b in batches) and any(b._is_trailing() for b in batches)


def append_rows(batches: Sequence[Any]) -> Any:
    """Append the rows of all roles of an encoder."""
    if len(batches) == 1:
        return batches[0]

    kinds = {type(b) for b in batches}
    if len(kinds) > 1:
        names = " and ".join(sorted(k.__name__ for k in kinds))
        raise TypeError(f"Roles that share an encoder must be of one type, but are {names}.")

    return type(batches[0]).concat(batches)


def as_rows(role: Any) -> Rows:
    """Wrap one argument of a step.

    :raises TypeError: it is neither an ``EncoderBatch`` nor a dict of tensors.
    """
    if isinstance(role, Mapping):
        return DictRows(role)
    if isinstance(role, Rows):
        return role
    raise TypeError(f"A role must be an EncoderBatch or a dict of tensors, but is of type `{type(role).__name__}`.")

"""What the engine needs of a batch: rows that can be counted, priced, selected and appended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from vembed_fs2.embedding.batch import Profile

TokenDims: TypeAlias = Mapping[str, Sequence[int]]
"""The name of a tensor of a dict -> its dimensions that count tokens; none of a tensor that is not cut."""

_OF_IMAGES: Final = ("pixel", "image", "spatial")
"""How transformers' names of what describes images begin."""


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

    A tensor is cut with the tokens, whatever its type, if its shape is ``[N, L]`` or
    ``[N, L, k]``; a mask or bias of pairs (boolean, or so called) if it is
    ``[N, L, L]`` or ``[N, h, L, L]``, on both sides. Never cut are tensors that are called
    after images, and those whose width is not that of the tokens in every batch.

    :param token_dims: the dimensions that count tokens, of tensors for which this is not so.
    :raises ValueError: such a dimension is not as wide as the mask.
    """

    def __init__(self, tensors: Mapping[str, Tensor], token_dims: TokenDims | None = None) -> None:
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

        self._declared = dict(token_dims or {})
        self._token_dims = {name: self._find_token_dims(name, tensor) for name, tensor in self._tensors.items()}

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

    def _find_token_dims(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        """The dimensions of a tensor that count tokens."""
        if self._shape is None:
            return ()

        width = self._shape[1]
        if (declared := self._declared.get(name)) is not None:
            for dim in declared:
                if not 0 < dim < tensor.ndim or tensor.size(dim) != width:
                    raise ValueError(
                        f"`token_dims` says that dimension {dim} of `{name}` counts tokens, but `attention_mask` is"
                        f" {list(self._shape)}, and `{name}` is {list(tensor.shape)}."
                    )
            return tuple(declared)

        if name.startswith(_OF_IMAGES):
            return ()

        is_of_pairs = tensor.dtype == torch.bool or name.endswith(("mask", "bias"))
        if is_of_pairs and tensor.ndim in (3, 4) and tensor.shape[-2:] == (width, width):
            return tensor.ndim - 2, tensor.ndim - 1

        return (1,) if tensor.ndim in (2, 3) and tensor.size(1) == width else ()

    def select(self, rows: Sequence[int]) -> dict[str, Tensor]:
        chunk = {k: v[torch.as_tensor(rows, device=v.device)] for k, v in self._tensors.items()}
        if self._lengths is not None:
            width = max(1, *(self._lengths[r] for r in rows))
            for name, dims in self._token_dims.items():
                for dim in dims:
                    chunk[name] = chunk[name].narrow(dim, 0, width)
        return chunk

    def cut(self) -> tuple[DictRows, list[tuple[Tensor, Tensor]]]:
        leaves = {name: t.detach().requires_grad_() for name, t in self._tensors.items() if t.requires_grad}
        if not leaves:
            return self, []

        links = [(self._tensors[name], leaf) for name, leaf in leaves.items()]
        return DictRows({**self._tensors, **leaves}, self._declared), links

    @staticmethod
    def concat(batches: Sequence[DictRows]) -> DictRows | SeparateRows:
        batches = _agreed(batches)
        if not _fit(batches):
            return SeparateRows(batches)

        width = max(b._shape[1] if b._shape is not None else 0 for b in batches)
        names = batches[0]._tensors
        tensors = {name: torch.cat([b._padded(name, width) for b in batches]) for name in names}
        return DictRows(tensors, {**batches[0]._declared, **batches[0]._token_dims})

    def _is_trailing(self) -> bool:
        """Whether there is padding, all of it on the right."""
        return self._lengths is not None and self._shape is not None and min(self._lengths, default=0) < self._shape[1]

    def _shapes(self) -> dict[str, Any]:
        """The type, the dimensions that count tokens, and the shape of a row without these, of each tensor."""
        return {
            name: (tensor.dtype, dims, [size for d, size in enumerate(tensor.shape) if d > 0 and d not in dims])
            for (name, tensor), dims in zip(self._tensors.items(), self._token_dims.values())
        }

    def _padded(self, name: str, width: int) -> Tensor:
        tensor = self._tensors[name]
        pad = [0, 0] * tensor.ndim
        for dim in self._token_dims[name]:
            pad[2 * (tensor.ndim - dim) - 1] = width - tensor.size(dim)
        return torch.nn.functional.pad(tensor, pad) if any(pad) else tensor


def _agreed(batches: Sequence[DictRows]) -> Sequence[DictRows]:
    """The same rows; a tensor that counts no tokens in one batch is as wide as the tokens of another by accident."""
    names = {name for batch in batches for name, dims in batch._token_dims.items() if not dims}
    return [DictRows(b._tensors, {**dict.fromkeys(names, ()), **b._declared}) for b in batches]


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


def as_rows(role: Any, token_dims: TokenDims | None = None) -> Rows:
    """Wrap one argument of a step.

    :param token_dims: which dimensions of the tensors of a dict count tokens; see :class:`DictRows`.
    :raises TypeError: it is neither an ``EncoderBatch`` nor a dict of tensors.
    """
    if isinstance(role, Mapping):
        return DictRows(role, token_dims)
    if isinstance(role, Rows):
        return role
    raise TypeError(f"A role must be an EncoderBatch or a dict of tensors, but is of type `{type(role).__name__}`.")

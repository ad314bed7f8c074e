"""All rows of one encoder during a step: encoded in chunks, carried backward chunk by chunk.

Legend: N rows of the encoder (of all its roles), n rows of a chunk, D embedding
size, L vectors per row of multi-vector models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from vembed_fs2.distributed import GradSync
from vembed_fs2.embedding.inputs import Kind
from vembed_fs2.gradcache.lookups import add_lookups_in_place
from vembed_fs2.gradcache.planner import Chunk
from vembed_fs2.gradcache.replay import Autocast, RngState
from vembed_fs2.gradcache.rows import Rows, append_rows
from vembed_fs2.reachable import find_module_with


@dataclass(eq=False)
class EncodedChunk:
    """A chunk and what the encoder made of it."""

    chunk: Chunk
    values: Tensor | None = None
    """The embeddings; with their graph if it is kept."""

    mask: Tensor | None = None
    kept: bool = False
    rng: RngState | None = None


@dataclass(eq=False)
class Group:
    """All rows of one encoder, and their embeddings."""

    index: int
    encoder: Callable[[Any], Any]
    sync: GradSync
    roles: list[tuple[int, Rows]] = field(default_factory=list)
    chunks: list[EncodedChunk] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    links: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Inputs that need a gradient, each with the leaf that gathers it."""

    trained_kinds: set[int] = field(default_factory=set)
    _kinds_without_lookups: set[int] = field(default_factory=set)
    """Kinds without a lookup that can be added in place, so that none is sought again in this step."""

    _rows: Rows | None = None
    _output_type: type[Any] | None = None
    _extras: tuple[Any, ...] = ()
    """What the first chunk returned besides embeddings, with its graph."""

    _extra_leaves: tuple[Any, ...] = ()
    _autocast: Autocast | None = None
    _device: torch.device | None = None

    def add(self, role: int, rows: Rows) -> None:
        if torch.is_grad_enabled():
            # Chunks are carried backward one by one, but the graph that made the inputs must be only once.
            rows, links = rows.cut()
            self.links += links
        self.roles.append((role, rows))

    @property
    def rows(self) -> Rows:
        if self._rows is None:
            self._rows = append_rows([rows for _, rows in self.roles])
        return self._rows

    def firsts(self) -> list[int]:
        """The first chunk of each kind. They are encoded, and carried backward, before the others."""
        kinds = [e.chunk.kind for e in self.chunks]
        return [kinds.index(kind) for kind in dict.fromkeys(kinds)]

    @property
    def device(self) -> torch.device:
        assert self._device is not None
        return self._device

    def encode(self, encoded: EncodedChunk, *, keep: bool) -> None:
        inputs = self._inputs(encoded.chunk)

        device = _device_of(inputs)
        if self._autocast is None:
            self._autocast = Autocast(device, cache=self.sync.shares_casts)
        if not keep and torch.is_grad_enabled():
            encoded.rng = RngState(self.device)  # The device of the first chunk, which was kept.

        with self.sync.no_sync(), torch.set_grad_enabled(keep), self._autocast.entered():
            output = self.encoder(inputs)

        encoded.values, encoded.mask, extras = self._unpack(output, max(len(encoded.chunk.rows), 1))
        if self._device is None:
            # An encoder may move its inputs to its device, or its embeddings from it.
            self._device = encoded.values.device if device.type == "cpu" else device

        encoded.kept = keep
        if encoded is self.chunks[0]:
            self._extras = extras
        if keep and encoded.values.requires_grad:
            self.trained_kinds.add(encoded.chunk.kind)

    def _inputs(self, chunk: Chunk) -> Any:
        """Return the inputs of a chunk: its rows, or a blank row if it has none.

        :raises ValueError: a blank row is needed, and the encoder has none.
        """
        if chunk.rows:
            return self.rows.select(chunk.rows)

        model = find_module_with(self.encoder, "blank")
        if model is None:
            raise ValueError(
                f"This rank has no rows of {Kind(chunk.kind).describe()}, but other ranks have, and all ranks must run"
                " the parts of a sharded model. The encoder needs a method `blank(kind)` that returns a batch of one"
                " such row (`EmbeddingModel` has it)."
            )

        inputs = model.blank(Kind(chunk.kind))
        inputs.to(_device_of(self.rows))
        return inputs

    def _unpack(self, output: Any, num_rows: int) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
        extras: tuple[Any, ...]
        if isinstance(output, Tensor):
            values, mask, extras = output, None, ()
        elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            self._output_type = type(output)
            values, mask, extras = output[0], output[1] if len(output) > 1 else None, tuple(output[2:])
        else:
            kind = type(output).__name__
            raise TypeError(f"`encode` must return a tensor or a tuple that begins with one, but returned `{kind}`.")

        if values.ndim not in (2, 3) or values.size(0) != num_rows:
            raise ValueError(
                f"`encode` must return [n, D] or [n, L, D] for n = {num_rows} rows, but returned {list(values.shape)}."
            )

        if mask is not None and (values.ndim == 2 or mask.shape != values.shape[:2]):
            raise ValueError(
                f"A mask must be [n, L] for embeddings [n, L, D], but is {list(mask.shape)} for {list(values.shape)}."
            )

        if wrong := [type(e).__name__ for e in tree_leaves(extras) if not (e is None or isinstance(e, Tensor))]:
            raise TypeError(
                f"`encode` must return tensors after the embeddings and their mask, but returned `{wrong[0]}`."
            )

        return values, mask, extras

    def role_outputs(self) -> list[tuple[int, Any]]:
        """Cut the graphs: for each role, what the loss gets."""
        values, mask = self._assemble()
        needs_grad = torch.is_grad_enabled()

        self._extra_leaves = tree_map(
            lambda e: None if e is None else e.detach().requires_grad_(needs_grad and e.requires_grad), self._extras
        )
        outputs = []
        start = 0
        for role, rows in self.roles:
            stop = start + len(rows)
            leaf = values[start:stop].detach().requires_grad_(needs_grad)
            self.leaves.append(leaf)
            outputs.append((role, self._pack(leaf, None if mask is None else mask[start:stop])))
            start = stop

        return outputs

    def _pack(self, values: Tensor, mask: Tensor | None) -> Any:
        if self._output_type is None:
            return values
        if self._output_type in (tuple, list):
            return self._output_type((values, mask, *self._extra_leaves))
        return self._output_type(values, mask, *self._extra_leaves)

    def _assemble(self) -> tuple[Tensor, Tensor | None]:
        """Put the chunks' embeddings in row order. *Returns:* ``[N, D]``, or ``[N, L, D]`` and ``[N, L]``."""
        real = [e for e in self.chunks if not e.chunk.dummy]

        parts = [e.values for e in real if e.values is not None]
        if len({(p.ndim, p.size(-1)) for p in parts}) > 1:
            raise ValueError(f"`encode` returned embeddings of several sizes: {[list(p.shape) for p in parts]}.")

        dtype = reduce(torch.promote_types, [p.dtype for p in parts])
        num_rows, first = len(self.rows), parts[0]
        mask = None
        if first.ndim == 2:
            values = first.new_empty(num_rows, first.size(1), dtype=dtype)
        else:
            widths = {p.size(1) for p in parts}
            if len(widths) > 1 and all(e.mask is None for e in real):
                raise ValueError("Rows have different numbers of vectors: `encode` must return `(embeddings, mask)`.")

            values = first.new_zeros(num_rows, max(widths), first.size(2), dtype=dtype)
            mask = torch.zeros(num_rows, max(widths), dtype=torch.bool, device=first.device)

        for encoded, part in zip(real, parts):
            rows = torch.tensor(encoded.chunk.rows, device=values.device)
            if mask is None:
                values[rows] = part.detach().to(dtype)
            else:
                values[rows, : part.size(1)] = part.detach().to(dtype)
                mask[rows, : part.size(1)] = True if encoded.mask is None else encoded.mask.bool()

        for encoded in self.chunks:
            if not encoded.kept:
                encoded.values = None

        return values, mask

    def backward(self) -> None:
        """Carry the gradients of the leaves through the encoder."""
        grad = torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in self.leaves])
        self.leaves = []
        firsts = self.firsts()
        order = sorted(range(len(self.chunks)), key=lambda idx: (idx not in firsts, idx))

        tasks = [self.chunks[idx] for idx in order if self._is_trained(self.chunks[idx])]
        first_chunks = [self.chunks[idx] for idx in firsts]
        for idx, encoded in enumerate(tasks):
            with self.sync.backward(last=idx == len(tasks) - 1):
                # The first of each kind are measured in some steps, which hides their lookups; a run that was
                # resumed measures anew, and must add up in the same order.
                self._backward_chunk(encoded, grad, in_place=encoded not in first_chunks)

        self.sync.finish()

    def _is_trained(self, encoded: EncodedChunk) -> bool:
        # A temperature can be trained where the rows of the first chunk are of a frozen tower.
        leaves = tree_leaves(self._extra_leaves)
        has_extras = encoded is self.chunks[0] and any(x is not None and x.grad is not None for x in leaves)
        return has_extras or encoded.chunk.kind in self.trained_kinds

    def _backward_chunk(self, encoded: EncodedChunk, grad: Tensor, *, in_place: bool) -> None:
        if not encoded.kept:
            self._replay(encoded)

        values = encoded.values
        assert values is not None

        tensors: list[Tensor] = []
        grads: list[Tensor] = []
        if values.requires_grad:
            tensors.append(values)
            grads.append(_rows_of(grad, encoded.chunk, values))

        if encoded is self.chunks[0]:
            for extra, leaf in zip(tree_leaves(self._extras), tree_leaves(self._extra_leaves)):
                if extra is not None and leaf is not None and leaf.grad is not None:
                    tensors.append(extra)
                    grads.append(leaf.grad)
            self._extras = ()

        encoded.values = None
        can_add = in_place and self.device.type == "cpu" and encoded.chunk.kind not in self._kinds_without_lookups
        if can_add and add_lookups_in_place(values) == 0:
            self._kinds_without_lookups.add(encoded.chunk.kind)

        torch.autograd.backward(tensors, grads)

    def _replay(self, encoded: EncodedChunk) -> None:
        assert encoded.rng is not None
        assert self._autocast is not None

        with torch.set_grad_enabled(True):
            inputs = self._inputs(encoded.chunk)

        with torch.set_grad_enabled(True), self._autocast.entered(), encoded.rng.restored():
            output = self.encoder(inputs)

        encoded.values, encoded.mask, _ = self._unpack(output, max(len(encoded.chunk.rows), 1))


def _rows_of(grad: Tensor, chunk: Chunk, values: Tensor) -> Tensor:
    """The gradient of a chunk's embeddings. Dummies are not used, so theirs is zero."""
    if chunk.dummy:
        return torch.zeros_like(values)

    rows = torch.tensor(chunk.rows, device=grad.device)
    chunk_grad = grad[rows] if grad.ndim == 2 else grad[rows, : values.size(1)]
    return chunk_grad.to(values.dtype)


def _device_of(inputs: Any) -> torch.device:
    device = getattr(inputs, "device", None)
    if isinstance(device, torch.device):
        return device

    values = inputs.values() if isinstance(inputs, dict) else vars(inputs).values()
    for value in values:
        if isinstance(value, Tensor):
            return value.device

    return torch.device("cpu")

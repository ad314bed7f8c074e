"""The gradient-cache step.

Legend: N rows of one encoder (of all its roles), D embedding size, L vectors
per row of multi-vector models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module

from vembed_fs2.distributed import GradSync, grad_sync_of
from vembed_fs2.gradcache.planner import Budget, Chunk, count_kept, match_counts, parse_budget, plan_chunks
from vembed_fs2.gradcache.replay import Autocast, RngState, SavedBytes
from vembed_fs2.gradcache.rows import Rows, as_rows


@dataclass
class StepStats:
    """What the last step did."""

    num_chunks: int = 0
    num_kept: int = 0
    num_tokens: int = 0
    """Tokens without padding."""

    num_padded_tokens: int = 0
    """Tokens with padding."""

    @property
    def kept_fraction(self) -> float:
        """The fraction of chunks whose graph was kept."""
        return self.num_kept / max(self.num_chunks, 1)

    @property
    def padding_fraction(self) -> float:
        """The fraction of encoded tokens that was padding."""
        return 1.0 - self.num_tokens / max(self.num_padded_tokens, 1)


class GradCache:
    """A contrastive step over more rows than fit in memory at once.

    Rows are encoded in chunks; the loss sees all embeddings; its gradient with
    respect to each embedding is then carried through the encoder chunk by
    chunk. The gradient is that of the plain step, with dropout, autocast, loss
    scaling, gradient accumulation, DDP and FSDP2.

    .. code:: python

        step = GradCache(encode, loss, chunk_tokens=2048)
        value = step(queries, documents)
        value.backward()

    :param encode: ``encode(chunk)`` returns embeddings ``[n, D]``, or a tuple
        ``(embeddings [n, L, D], mask [n, L], *extras)``. One for all roles, or a
        list with one for each. Modules wrapped in DDP or FSDP2 are recognised.
    :param loss: ``loss(*embeddings, **kwargs)`` returns a scalar. It gets what
        ``encode`` returns, for all rows of each role.
    :param chunk_tokens: the cost of a chunk, padding included, in tokens.
    :param activation_budget: the memory for graphs that are kept instead of
        recomputed: ``"auto"``, ``"all"``, ``0`` or a size such as ``"4GiB"``.
        One chunk's graph is kept in any case.
    :param sync: how gradients are reduced; found from ``encode`` if ``None``.
    """

    def __init__(
        self,
        encode: Callable[[Any], Any] | Sequence[Callable[[Any], Any]],
        loss: Callable[..., Tensor],
        *,
        chunk_tokens: int = 2048,
        activation_budget: Budget = "auto",
        sync: GradSync | None = None,
    ) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"`chunk_tokens` must be greater than or equal to 1, but is {chunk_tokens} instead.")
        self._encode = encode
        self._loss = loss
        self._chunk_tokens = chunk_tokens
        self._budget: Budget = activation_budget
        self._budget_bytes: int | None = None
        self._bytes_per_token: dict[int, float] = {}
        self._sync = sync
        self.stats = StepStats()

    def __call__(self, *roles: Any, **loss_kwargs: Any) -> Tensor:
        """Run the step's forward passes and its loss.

        :param roles: one batch per role: an ``EncoderBatch``, or a dict of
            tensors with a leading row dimension.
        :param loss_kwargs: passed to the loss.
        :returns: a scalar whose ``backward()`` fills the parameters' gradients.
        """
        self.stats = StepStats()
        groups = self._group(roles)
        for group in groups:
            self._plan(group)
            self._forward(group)
        leaves: list[Tensor | None] = [None] * len(roles)
        embeddings: list[Any] = [None] * len(roles)
        for group in groups:
            for role, leaf, output in group.role_outputs():
                leaves[role], embeddings[role] = leaf, output
        if not torch.is_grad_enabled():
            return self._loss(*embeddings, **loss_kwargs)
        value = self._loss(*embeddings, **loss_kwargs)
        extras = [leaf for group in groups for leaf in group.extra_leaves]
        inputs = [*(leaf for leaf in leaves if leaf is not None), *extras, *self._loss_parameters()]
        grads = torch.autograd.grad(value, inputs, allow_unused=True)
        step = _Step(groups, self._loss_parameters(), list(grads))
        trigger = value.new_zeros((), requires_grad=True)
        return _Backward.apply(value.detach(), trigger, step)  # type: ignore[no-any-return]

    def _loss_parameters(self) -> list[Tensor]:
        if not isinstance(self._loss, Module):
            return []
        return [p for p in self._loss.parameters() if p.requires_grad]

    def _group(self, roles: Sequence[Any]) -> list[_Group]:
        encoders = self._encode
        if callable(encoders):
            encoders = [encoders] * len(roles)
        if len(encoders) != len(roles):
            raise ValueError(f"There are {len(encoders)} encoders, but {len(roles)} roles.")
        groups: dict[int, _Group] = {}
        for idx, (encoder, role) in enumerate(zip(encoders, roles)):
            group = groups.get(id(encoder))
            if group is None:
                sync = self._sync if self._sync is not None else grad_sync_of(encoder)
                group = groups[id(encoder)] = _Group(len(groups), encoder, sync)
            group.add(idx, as_rows(role))
        return list(groups.values())

    def _plan(self, group: _Group) -> None:
        rows = group.rows
        costs, kinds = rows.costs(), rows.kinds()
        chunks = plan_chunks(costs, kinds, self._chunk_tokens)
        if group.sync.runs_in_step:
            own = {kind: sum(c.kind == kind for c in chunks) for kind in set(kinds)}
            chunks = match_counts(chunks, group.sync.agree_counts(own), costs)
        group.chunks = [_EncodedChunk(chunk) for chunk in chunks]
        self.stats.num_chunks += len(chunks)
        self.stats.num_tokens += sum(costs)
        self.stats.num_padded_tokens += sum(c.tokens for c in chunks)

    def _forward(self, group: _Group) -> None:
        if not torch.is_grad_enabled():
            for encoded in group.chunks:
                group.encode(encoded, keep=False)
            return
        # The first chunk of each kind is kept: it says whether that encoder is
        # trained at all, and is as large as any chunk that will be replayed.
        firsts = group.firsts()
        for idx in firsts:
            self._encode_first(group, group.chunks[idx])
        # Kept chunks run first: under autocast, a weight cast without grad mode
        # would be cached and cut the graphs of the chunks that come after it.
        rest = [e for idx, e in enumerate(group.chunks) if idx not in firsts]
        num_kept = self._count_kept(group, rest)
        for position, encoded in enumerate(rest):
            group.encode(encoded, keep=position < num_kept)
        self.stats.num_kept += len(firsts) + num_kept

    def _encode_first(self, group: _Group, encoded: _EncodedChunk) -> None:
        if group.index in self._bytes_per_token or self._budget in (0, "all"):
            group.encode(encoded, keep=True)
            return
        saved = SavedBytes()
        with saved.measuring():
            group.encode(encoded, keep=True)
        self._bytes_per_token[group.index] = saved.total / max(encoded.chunk.tokens, 1)

    def _count_kept(self, group: _Group, chunks: Sequence[_EncodedChunk]) -> int:
        sync = group.sync
        if self._budget_bytes is None:
            self._budget_bytes = -sync.agree_max([-parse_budget(self._budget, group.device)])[0]
        if self._budget_bytes == 0 or not chunks:
            return 0
        tokens = sync.agree_max([e.chunk.tokens for e in chunks])
        bytes_per_token = sync.agree_max([int(self._bytes_per_token.get(group.index, 0.0)) + 1])[0]
        return count_kept(tokens, self._budget_bytes, bytes_per_token)


@dataclass
class _EncodedChunk:
    chunk: Chunk
    values: Tensor | None = None
    """The embeddings; with their graph if it is kept."""

    mask: Tensor | None = None
    extras: tuple[Tensor | None, ...] = ()
    kept: bool = False
    rng: RngState | None = None


@dataclass
class _Group:
    """All rows of one encoder, and their embeddings."""

    index: int
    encoder: Callable[[Any], Any]
    sync: GradSync
    roles: list[tuple[int, Rows]] = field(default_factory=list)
    chunks: list[_EncodedChunk] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    extra_leaves: list[Tensor] = field(default_factory=list)
    trained_kinds: set[int] = field(default_factory=set)
    _rows: Rows | None = None
    _output_type: type | None = None
    _autocast: Autocast | None = None
    _device: torch.device | None = None

    def add(self, role: int, rows: Rows) -> None:
        self.roles.append((role, rows))

    @property
    def rows(self) -> Rows:
        if self._rows is None:
            batches = [rows for _, rows in self.roles]
            self._rows = batches[0] if len(batches) == 1 else type(batches[0]).concat(batches)
        return self._rows

    def firsts(self) -> list[int]:
        """The first chunk of each kind. They are encoded, and carried backward, before the others."""
        kinds = [e.chunk.kind for e in self.chunks]
        return [kinds.index(kind) for kind in dict.fromkeys(kinds)]

    @property
    def device(self) -> torch.device:
        assert self._device is not None
        return self._device

    def encode(self, encoded: _EncodedChunk, *, keep: bool) -> None:
        inputs = self.rows.select(encoded.chunk.rows)
        device = _device_of(inputs)
        if self._autocast is None:
            self._autocast, self._device = Autocast(device), device
        if not keep:
            encoded.rng = RngState(device)
        with self.sync.no_sync(), torch.set_grad_enabled(keep):
            output = self.encoder(inputs)
        encoded.values, encoded.mask, encoded.extras = self._unpack(output)
        encoded.kept = keep
        if keep and encoded.values.requires_grad:
            self.trained_kinds.add(encoded.chunk.kind)

    def _unpack(self, output: Any) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        if isinstance(output, Tensor):
            return output, None, ()
        self._output_type = type(output)
        return output[0], output[1] if len(output) > 1 else None, tuple(output[2:])

    def role_outputs(self) -> list[tuple[int, Tensor, Any]]:
        """Cut the graphs: for each role, its leaf and what the loss gets."""
        values, mask = self._assemble()
        self.extra_leaves = []
        extras: list[Tensor | None] = []
        for extra in self.chunks[0].extras:
            leaf = None if extra is None else extra.detach().requires_grad_()
            extras.append(leaf)
            if leaf is not None:
                self.extra_leaves.append(leaf)
        outputs = []
        start = 0
        for role, rows in self.roles:
            stop = start + len(rows)
            leaf = values[start:stop].detach().requires_grad_()
            role_mask = None if mask is None else mask[start:stop]
            outputs.append((role, leaf, self._pack(leaf, role_mask, extras)))
            start = stop
        self.leaves = [leaf for _, leaf, _ in outputs]
        return outputs

    def _pack(self, values: Tensor, mask: Tensor | None, extras: list[Tensor | None]) -> Any:
        if self._output_type is None:
            return values
        if self._output_type in (tuple, list):
            return (values, mask, *extras)
        return self._output_type(values, mask, *extras)

    def _assemble(self) -> tuple[Tensor, Tensor | None]:
        """Put the chunks' embeddings in row order. *Returns:* ``[N, D]``, or ``[N, L, D]`` and ``[N, L]``."""
        first = self.chunks[0].values
        assert first is not None
        num_rows = len(self.rows)
        if first.ndim == 2:
            values, mask = first.new_empty(num_rows, first.size(1)), None
        else:
            width = max(e.values.size(1) for e in self.chunks if e.values is not None)
            values = first.new_zeros(num_rows, width, first.size(2))
            mask = torch.zeros(num_rows, width, dtype=torch.bool, device=first.device)
        for encoded in self.chunks:
            if encoded.chunk.dummy:
                continue
            assert encoded.values is not None
            rows = torch.tensor(encoded.chunk.rows, device=values.device)
            if mask is None:
                values[rows] = encoded.values.detach()
            else:
                width = encoded.values.size(1)
                values[rows, :width] = encoded.values.detach()
                mask[rows, :width] = True if encoded.mask is None else encoded.mask
            if not encoded.kept:
                encoded.values = None
        return values, mask

    def backward(self, grad: Tensor, extra_grads: list[Tensor | None]) -> None:
        """Carry ``grad`` (``[N, D]`` or ``[N, L, D]``) through the encoder."""
        firsts = self.firsts()
        order = sorted(range(len(self.chunks)), key=lambda idx: (idx not in firsts, idx))
        tasks = [self.chunks[idx] for idx in order if self.chunks[idx].chunk.kind in self.trained_kinds]
        for idx, encoded in enumerate(tasks):
            with self.sync.backward(last=idx == len(tasks) - 1):
                self._backward_chunk(encoded, grad, extra_grads if encoded is self.chunks[0] else [])
        self.sync.finish()

    def _backward_chunk(self, encoded: _EncodedChunk, grad: Tensor, extra_grads: list[Tensor | None]) -> None:
        if not encoded.kept:
            self._replay(encoded)
        values = encoded.values
        assert values is not None
        rows = torch.tensor(encoded.chunk.rows, device=grad.device)
        chunk_grad = grad[rows] if grad.ndim == 2 else grad[rows, : values.size(1)]
        if encoded.chunk.dummy:
            chunk_grad = torch.zeros_like(chunk_grad)
        tensors, grads = [values], [chunk_grad.to(values.dtype)]
        present = [e for e in encoded.extras if e is not None]
        for extra, extra_grad in zip(present, extra_grads):
            if extra.requires_grad and extra_grad is not None:
                tensors.append(extra)
                grads.append(extra_grad)
        torch.autograd.backward(tensors, grads)
        encoded.values, encoded.extras = None, ()

    def _replay(self, encoded: _EncodedChunk) -> None:
        assert encoded.rng is not None
        assert self._autocast is not None
        inputs = self.rows.select(encoded.chunk.rows)
        with torch.enable_grad(), self._autocast.entered(), encoded.rng.restored():
            output = self.encoder(inputs)
        encoded.values, encoded.mask, encoded.extras = self._unpack(output)


class _Step:
    """The cached gradients of a step, to be carried through the encoders once."""

    def __init__(self, groups: list[_Group], loss_parameters: list[Tensor], grads: list[Tensor | None]) -> None:
        self._groups = groups
        self._loss_parameters = loss_parameters
        # In the order of `GradCache.__call__`: roles, extras, loss parameters.
        num_roles = sum(len(g.roles) for g in groups)
        self._role_grads = grads[:num_roles]
        num_extras = sum(len(g.extra_leaves) for g in groups)
        self._extra_grads = grads[num_roles : num_roles + num_extras]
        self._loss_grads = grads[num_roles + num_extras :]
        self._done = False

    def backward(self, scale: Tensor) -> None:
        if self._done:
            raise RuntimeError("`backward()` was called twice on one step; the graphs of its chunks are gone.")
        self._done = True
        start = 0
        for group in self._groups:
            stop = start + len(group.extra_leaves)
            extra_grads = [None if g is None else g * scale for g in self._extra_grads[start:stop]]
            start = stop
            parts = [self._role_grads[role] for role, _ in group.roles]
            filled = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(parts, group.leaves)]
            group.backward(torch.cat(filled) * scale, extra_grads)
        for parameter, grad in zip(self._loss_parameters, self._loss_grads):
            if grad is not None:
                grad = grad * scale
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad


class _Backward(torch.autograd.Function):
    """A scalar whose backward pass runs the cached step, multiplied by the incoming gradient.

    The incoming gradient carries loss scaling and accumulation, so both stay exact.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, trigger: Tensor, step: _Step) -> Tensor:
        ctx.step = step
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.step.backward(grad)
        return None, None, None


def _device_of(inputs: Any) -> torch.device:
    values = inputs.values() if isinstance(inputs, dict) else vars(inputs).values()
    for value in values:
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")

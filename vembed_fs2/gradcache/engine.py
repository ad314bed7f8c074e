"""The gradient-cache step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vembed_fs2.distributed import GradSync, after_backward, grad_sync_of
from vembed_fs2.gradcache.group import EncodedChunk, Group
from vembed_fs2.gradcache.planner import Budget, count_kept, match_counts, parse_budget, plan_chunks
from vembed_fs2.gradcache.replay import RngState, SavedBytes, is_out_of_memory
from vembed_fs2.gradcache.rows import TokenDims, as_rows
from vembed_fs2.reachable import find_reachable

log = logging.getLogger("vembed_fs2")


@dataclass
class StepStats:
    """What the last step did."""

    num_chunks: int = 0
    num_kept: int = 0
    num_tokens: int = 0
    """Tokens without padding."""

    num_padded_tokens: int = 0
    """Tokens with padding."""

    graph_bytes: int = 0
    """The bytes that the graphs of all chunks would hold, estimated from the first step."""

    @property
    def kept_fraction(self) -> float:
        """The fraction of chunks whose graph was kept."""
        return self.num_kept / max(self.num_chunks, 1)

    @property
    def padding_fraction(self) -> float:
        """The fraction of encoded tokens that was padding."""
        return 1.0 - self.num_tokens / max(self.num_padded_tokens, 1)

    @property
    def bytes_per_token(self) -> float:
        """What a kept graph holds per token, padding included."""
        return self.graph_bytes / max(self.num_padded_tokens, 1)


class GradCache:
    """A contrastive step over more rows than fit in memory at once.

    Rows are encoded in chunks; the loss sees all embeddings; its gradient with
    respect to each embedding is then carried through the encoder chunk by
    chunk. The gradient equals the plain step's, with dropout, autocast, loss
    scaling, gradient accumulation, DDP and FSDP2. What an encoder makes of a
    row must not depend on the other rows of its chunk, as batch normalisation
    does.

    .. code:: python

        step = GradCache(encode, loss, chunk_tokens=2048)
        value = step(queries, documents)
        value.backward()

    :param encode: ``encode(chunk)`` returns embeddings ``[n, D]``, or a tuple
        ``(embeddings, mask, *extras)``: embeddings ``[n, D]`` with the mask
        ``None``, or ``[n, L, D]`` with a mask ``[n, L]``; ``extras`` are tensors, or
        dicts of tensors, that do not depend on the rows, such as a learned temperature. One for
        all roles, or a list with one for each. DDP and FSDP2 modules are
        recognised, also inside another module, a function or a method.
    :param loss: ``loss(*embeddings, **kwargs)`` returns a scalar. It gets what
        ``encode`` returns, for all rows of each role. It may have parameters.
    :param chunk_tokens: the most tokens of a chunk, padding included. A row
        without tokens costs 1.
    :param chunk_patches: the most patches of images in a chunk; if ``None``,
        patches count as tokens.
    :param activation_budget: the memory for graphs that are kept instead of
        recomputed: ``"auto"`` (half of what is free), ``"all"``, ``0`` or a size
        such as ``"4GiB"`` for all encoders together. The first graph of each
        encoder and kind of rows is kept in any case, and is not counted. When
        memory runs out while a graph is kept, that chunk is encoded anew and
        fewer are kept from then on; not with FSDP2 or tensor parallelism, whose
        ranks cannot repeat a forward pass alone.
    :param grad_sync: when FSDP2 reduces gradients: after the ``"last"`` chunk,
        with whole gradients in memory until then, or after ``"every_chunk"``,
        with the least memory and the most communication.
    :param token_dims: for dicts of tensors: the name of a tensor -> its dimensions that count tokens, such as
        ``{"weights": (1,), "features": ()}``, if they are not found right by
        their sizes (see :class:`~vembed_fs2.gradcache.rows.DictRows`).
    :param sync: how gradients are reduced; found from ``encode`` if ``None``.
    :raises ValueError: one of the sizes or ``grad_sync`` is not valid.
    """

    def __init__(
        self,
        encode: Callable[[Any], Any] | Sequence[Callable[[Any], Any]],
        loss: Callable[..., Tensor],
        *,
        chunk_tokens: int = 2048,
        chunk_patches: int | None = None,
        activation_budget: Budget = "auto",
        grad_sync: Literal["last", "every_chunk"] = "last",
        token_dims: TokenDims | None = None,
        sync: GradSync | None = None,
    ) -> None:
        for name, size in (("chunk_tokens", chunk_tokens), ("chunk_patches", chunk_patches)):
            if size is not None and size < 1:
                raise ValueError(f"`{name}` must be greater than or equal to 1, but is {size} instead.")

        if grad_sync not in ("last", "every_chunk"):
            raise ValueError(f"`grad_sync` must be 'last' or 'every_chunk', but is {grad_sync!r}.")

        parse_budget(activation_budget, torch.device("cpu"))
        self._encode = encode
        self._loss = loss
        self._chunk_tokens = chunk_tokens
        self._chunk_patches = chunk_patches
        self._budget: Budget = activation_budget
        self._budget_limit = 2**62  # Lowered when memory runs out.
        self._kept_bytes = 0  # By the encoders before, in this step.
        self._grad_sync = grad_sync
        self._bytes_per_token: dict[tuple[int, int], float] = {}
        self._token_dims = token_dims
        self._sync = sync
        self.stats = StepStats()

    def rebind(
        self, encode: Callable[[Any], Any] | Sequence[Callable[[Any], Any]], loss: Callable[..., Tensor]
    ) -> None:
        """Go on with another encode and loss call on the same models; what was measured is kept."""
        self._encode, self._loss = encode, loss

    def __call__(self, *roles: Any, **loss_kwargs: Any) -> Tensor:
        """Run the step's forward passes and its loss.

        :param roles: one batch per role: an ``EncoderBatch``, or a dict of
            tensors with a leading row dimension.
        :param loss_kwargs: passed to the loss.
        :returns: a scalar whose ``backward()`` fills the parameters' gradients.
        """
        self.stats = StepStats()
        self._kept_bytes = 0
        groups = self._group(roles)
        for group in groups:
            if torch.is_grad_enabled():
                group.sync.begin()
            self._plan(group)
            self._forward(group)

        embeddings: list[Any] = [None] * len(roles)
        for group in groups:
            for role, output in group.role_outputs():
                embeddings[role] = output

        value = self._loss(*embeddings, **loss_kwargs)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`loss` must return a scalar tensor, but returned {found}.")

        if not value.requires_grad:
            return value

        trigger = value.new_zeros((), requires_grad=True)
        return _Backward.apply(value.detach(), trigger, _Step(groups, value))  # type: ignore[no-any-return, no-untyped-call]

    def _group(self, roles: Sequence[Any]) -> list[Group]:
        encoders = self._encode
        if callable(encoders):
            encoders = [encoders] * len(roles)
        if len(encoders) != len(roles) or not roles:
            raise ValueError(f"There are {len(encoders)} encoders, but {len(roles)} roles.")

        groups: dict[int, Group] = {}
        for idx, (encoder, role) in enumerate(zip(encoders, roles)):
            group = groups.get(id(encoder))
            if group is None:
                sync = self._sync if self._sync is not None else grad_sync_of(encoder)
                if self._grad_sync == "every_chunk" and not sync.can_reduce_chunks:
                    raise ValueError("`grad_sync` must be 'last' with DDP, which averages gradients once.")

                sync.reduces_chunks = self._grad_sync == "every_chunk"
                _check_closure(encoder)
                group = groups[id(encoder)] = Group(len(groups), encoder, sync)

            group.add(idx, as_rows(role, self._token_dims))

        return list(groups.values())

    def _plan(self, group: Group) -> None:
        if len(group.rows) == 0:
            raise ValueError("A step needs at least one row for each encoder.")

        profile = group.rows.profile()
        chunks = plan_chunks(profile, self._chunk_tokens, self._chunk_patches)
        if group.sync.runs_in_step:
            own = {kind: sum(c.kind == kind for c in chunks) for kind in set(profile.kinds)}
            chunks = match_counts(chunks, group.sync.agree_counts(own), profile)

        group.chunks = [EncodedChunk(chunk) for chunk in chunks]
        self.stats.num_chunks += len(chunks)
        self.stats.num_tokens += sum(profile.costs())
        self.stats.num_padded_tokens += sum(c.tokens for c in chunks)

    def _forward(self, group: Group) -> None:
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
        sizes = group.sync.agree_max([self._graph_size(group, e) for e in rest])
        num_kept = self._count_kept(group, sizes)
        for position, encoded in enumerate(rest):
            if position < num_kept and not self._keep(group, encoded, kept=sum(sizes[:position])):
                num_kept = position
            if position >= num_kept:
                group.encode(encoded, keep=False)

        self._kept_bytes += sum(sizes[:num_kept])
        self.stats.num_kept += len(firsts) + num_kept
        self.stats.graph_bytes += sum(self._graph_size(group, e) for e in group.chunks)

    def _encode_first(self, group: Group, encoded: EncodedChunk) -> None:
        key = (group.index, encoded.chunk.kind)
        if key in self._bytes_per_token or not encoded.chunk.rows:
            group.encode(encoded, keep=True)
            return

        saved = SavedBytes(casts=not group.sync.shares_casts)
        with saved.measuring():
            group.encode(encoded, keep=True)

        self._bytes_per_token[key] = saved.total / max(encoded.chunk.tokens, 1)

    def _graph_size(self, group: Group, encoded: EncodedChunk) -> int:
        per_token = self._bytes_per_token.get((group.index, encoded.chunk.kind), 0.0)
        return int(encoded.chunk.tokens * per_token) + 1

    def _count_kept(self, group: Group, sizes: Sequence[int]) -> int:
        # Asked anew in each step: "auto" depends on what else is in memory by now.
        budget = parse_budget(self._budget, group.device)
        if self._budget == "auto":
            budget += self._kept_bytes  # They are no longer part of what is free.

        budget = min(budget, self._budget_limit) - self._kept_bytes
        budget = -group.sync.agree_max([-budget])[0]
        return count_kept(sizes, budget) if budget > 0 else 0

    def _keep(self, group: Group, encoded: EncodedChunk, *, kept: int) -> bool:
        """Encode a chunk with its graph; return whether memory was enough.

        :param kept: the bytes of the encoder's graphs that are kept already.
        """
        if group.sync.runs_in_step:
            group.encode(encoded, keep=True)
            return True

        before = RngState(group.device)

        try:
            group.encode(encoded, keep=True)
            return True
        except RuntimeError as ex:
            if not is_out_of_memory(ex):
                raise

        # Only here: while the exception is handled, its traceback holds the graph.
        before.set()

        if group.device.type == "cuda":
            torch.cuda.empty_cache()

        if self._budget_limit == 2**62:
            log.warning(
                "Memory ran out while the graphs of chunks were kept. From now on fewer are kept, and more are"
                " recomputed; `activation_budget` or `chunk_tokens` can be made smaller."
            )

        self._budget_limit = (self._kept_bytes + kept) * 3 // 4
        return False


def _check_closure(encoder: Callable[..., Any]) -> None:
    """:raises ValueError: the encoder uses a tensor whose graph each chunk would run through again."""
    if not torch.is_grad_enabled():
        return

    if next(find_reachable(encoder, lambda value: isinstance(value, Tensor) and not value.is_leaf), None) is not None:
        raise ValueError(
            "`encode` uses a tensor that was computed before the call and needs a gradient. Compute it within"
            " `encode`, or give it to the step as an input of the role."
        )


class _Step:
    """A step that waits for its backward pass, which can run once."""

    def __init__(self, groups: list[Group], value: Tensor) -> None:
        self._groups = groups
        self._value: Tensor | None = value

    def backward(self, scale: Tensor) -> None:
        if self._value is None:
            raise RuntimeError("`backward()` was called twice on one step; the graphs of its chunks are gone.")

        value, self._value = self._value, None
        groups, self._groups = self._groups, []

        if any(group.sync.has_hooks for group in groups):
            # Another loss in the same pass may use the same module: its hooks count on one backward pass.
            after_backward(lambda: self._run(value, groups, scale))
        else:
            self._run(value, groups, scale)

    @torch.no_grad()
    def _run(self, value: Tensor, groups: list[Group], scale: Tensor) -> None:
        # The loss itself is carried backward now and not in the forward pass, for
        # two reasons: with half precision its gradients would underflow without
        # the loss scale, and its own parameters get theirs like in a plain step.
        torch.autograd.backward(value, scale)

        for group in groups:
            group.backward()

        # Once for all, because roles may come from one graph.
        links = [(source, leaf.grad) for group in groups for source, leaf in group.links if leaf.grad is not None]
        if links:
            torch.autograd.backward([source for source, _ in links], [grad for _, grad in links])


class _Backward(torch.autograd.Function):
    """A scalar whose backward pass runs the step's, multiplied by the incoming gradient.

    The incoming gradient carries loss scaling and accumulation, so both stay exact.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, trigger: Tensor, step: _Step) -> Tensor:
        ctx.step = step
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.step.backward(grad)
        return None, None, None

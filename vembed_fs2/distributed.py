"""Everything that knows about process groups, DDP and FSDP2. Needs torch only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ContextManager, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

# Gradients are reduced in flat buffers of about this many elements.
_BUCKET_SIZE: Final = 8 * 2**20


class GradSync(ABC):
    """How the gradients of one encoder are reduced over ranks: once per step, after the last chunk."""

    runs_in_step: bool = False
    """If ``True``, a forward or backward pass of a chunk has collectives, so all ranks must run the same ones."""

    def no_sync(self) -> ContextManager[Any]:
        """Wraps each forward pass."""
        return nullcontext()

    def backward(self, *, last: bool) -> ContextManager[Any]:
        """Wraps each replay and backward pass of a chunk."""
        return nullcontext()

    def finish(self) -> None:
        """Called after the last chunk."""

    @abstractmethod
    def agree_max(self, values: list[int]) -> list[int]:
        """Return the maximum over ranks of each value."""

    def agree_counts(self, counts: dict[int, int]) -> dict[int, int]:
        """Return the maximum over ranks of the number of chunks of each kind (0 to 3)."""
        agreed = self.agree_max([counts.get(kind, 0) for kind in range(4)])
        return {kind: n for kind, n in enumerate(agreed) if n > 0}


class LocalSync(GradSync):
    """One process: nothing to reduce."""

    def agree_max(self, values: list[int]) -> list[int]:
        return values


class DdpSync(GradSync):
    """DDP: all chunks run inside ``no_sync``, then one pass averages all gradients.

    DDP's own reducer would fire on the first backward pass whose forward pass
    ran outside ``no_sync``, and it leaves out the accumulated gradients of
    parameters that the last chunk does not use (the image tower, when that
    chunk holds texts). Reducing here has neither problem, and lets every chunk
    keep its graph.
    """

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = module

    def no_sync(self) -> ContextManager[Any]:
        return _KeepFlag(self._module)

    def backward(self, *, last: bool) -> ContextManager[Any]:
        return _KeepFlag(self._module)

    def finish(self) -> None:
        # False inside the user's own `no_sync`, while gradients accumulate.
        if self._module.require_backward_grad_sync:
            average_gradients(list(self._module.parameters()), self._module.process_group)

    def agree_max(self, values: list[int]) -> list[int]:
        return values  # No collective runs in a chunk: each rank may do as it likes.


class _KeepFlag:
    """``DistributedDataParallel.no_sync`` that restores the flag that it found."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = module
        self._before = True

    def __enter__(self) -> None:
        self._before = self._module.require_backward_grad_sync
        self._module.require_backward_grad_sync = False

    def __exit__(self, *error: object) -> None:
        self._module.require_backward_grad_sync = self._before


class FsdpSync(GradSync):
    """FSDP2: the last backward pass of a step reduces and scatters what all of them accumulated."""

    runs_in_step = True

    def __init__(self, module: FSDPModule) -> None:
        self._module = module

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        self._module.set_requires_gradient_sync(last)
        self._module.set_is_last_backward(last)
        try:
            yield
        finally:
            self._module.set_requires_gradient_sync(True)
            self._module.set_is_last_backward(True)

    def agree_max(self, values: list[int]) -> list[int]:
        return all_max(values, None)  # Tensor and replica parallel ranks run the same chunks as well.


def grad_sync_of(encoder: Callable[..., Any]) -> GradSync:
    """Return how the gradients of ``encoder`` are reduced, judged by its type."""
    if isinstance(encoder, DistributedDataParallel):
        return DdpSync(encoder)
    if isinstance(encoder, FSDPModule):
        return FsdpSync(encoder)
    return LocalSync()


def average_gradients(parameters: Sequence[Parameter], group: ProcessGroup | None) -> None:
    """Average the gradients over ``group``, each exactly once.

    A parameter that has a gradient on some ranks only counts as zero on the
    others; one that has none anywhere keeps none.
    """
    size = dist.get_world_size(group)
    trained = [p for p in parameters if p.requires_grad]
    if size == 1 or not trained:
        return
    device = trained[0].device
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
    grads = []
    for parameter, is_used in zip(trained, used.tolist()):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
    pending = []
    for bucket in _buckets(grads):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        pending.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in pending:
        assert work is not None
        work.wait()
        flat.div_(size)
        for grad, part in zip(bucket, flat.split([g.numel() for g in bucket])):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    size = 0
    for grad in grads:
        if not buckets or size + grad.numel() > _BUCKET_SIZE or buckets[-1][0].dtype != grad.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(grad)
        size += grad.numel()
    return buckets


def all_max(values: list[int], group: ProcessGroup | None) -> list[int]:
    """Return the maximum over ranks of each value."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=_collective_device(group))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return [int(v) for v in tensor]


def _collective_device(group: ProcessGroup | None) -> torch.device:
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


class RowGather:
    """Appends the rows of all ranks of a group; ranks may hold different numbers of rows.

    Without a group (one process) it returns its input.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.size = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0

    def counts(self, num_rows: int) -> list[int]:
        """The number of rows of each rank."""
        if self.size == 1:
            return [num_rows]
        counts = [0] * self.size
        counts[self.rank] = num_rows
        return all_max(counts, self._group)

    def __call__(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Append the rows of all ranks, in rank order.

        The gradient of the result, summed over ranks, flows back to ``x``; so
        each rank must run the backward pass.

        :param x: this rank's rows. *Shape:* ``[counts[rank], ...]``.
        :returns: *Shape:* ``[sum(counts), ...]``.
        """
        if self.size == 1:
            return x
        return _GatherRows.apply(x, list(counts), self._group, self.rank)  # type: ignore[no-any-return]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: ProcessGroup, rank: int) -> Tensor:
        ctx.counts, ctx.group, ctx.rank = counts, group, rank
        width = max(counts)
        padded = x.new_zeros(width, *x.shape[1:])
        padded[: x.size(0)] = x
        gathered = x.new_empty(width * len(counts), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([gathered[i * width : i * width + n] for i, n in enumerate(counts)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        start = sum(ctx.counts[: ctx.rank])
        return grad[start : start + ctx.counts[ctx.rank]].clone(), None, None, None

"""Everything that knows about process groups, DDP and FSDP2. Needs torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from vembed_fs2.reachable import find_reachable

# Gradients are reduced in flat buffers of about this many elements.
_BUCKET_SIZE: Final = 8 * 2**20

# All sets of texts, images and features that a row can hold.
_NUM_KINDS: Final = 8


class GradSync:
    """How the gradients of one encoder are reduced over ranks: once per step, after the last chunk, by default."""

    runs_in_step: bool = False
    """If ``True``, a forward or backward pass of a chunk has collectives, so all ranks must run the same ones."""

    can_reduce_chunks: bool = True
    """If ``False``, gradients cannot be reduced after each chunk instead of once."""

    reduces_chunks: bool = False
    """If ``True``, they are."""

    shares_casts: bool = True
    """If ``False``, each chunk must cast weights for autocast anew."""

    has_hooks: bool = False
    """If ``True``, the module acts on each gradient as it comes, and expects one backward pass for a forward pass."""

    tensor_parallel: ProcessGroup | None = None
    """The ranks that share the layers of the encoder, if it is split over ranks."""

    def split_over(self, group: ProcessGroup) -> None:
        """Say that these ranks share the layers of the encoder: each forward pass of a chunk has collectives."""
        self.tensor_parallel = group
        self.runs_in_step = True

    def begin(self) -> None:
        """Called before the first chunk of a step that will be carried backward."""
        if self.tensor_parallel is not None:
            # What all of these ranks hold must stay the same on each, so dropout must draw the same for it.
            seed = int(torch.randint(2**62, ()))
            torch.manual_seed(all_max([seed], self.tensor_parallel)[0])

    def no_sync(self) -> AbstractContextManager[Any]:
        """Wraps each forward pass."""
        return nullcontext()

    def backward(self, *, last: bool) -> AbstractContextManager[Any]:
        """Wraps each replay and backward pass of a chunk."""
        return nullcontext()

    def finish(self) -> None:
        """Called after the last chunk."""
        return None

    def agree_max(self, values: list[int]) -> list[int]:
        """Return the maximum of each value over the ranks that must run the same chunks."""
        return values if self.tensor_parallel is None else all_max(values, self.tensor_parallel)

    def agree_counts(self, counts: dict[int, int]) -> dict[int, int]:
        """Return the maximum over ranks of the number of chunks of each kind (0 to 7)."""
        if not set(counts) <= set(range(_NUM_KINDS)):
            raise ValueError(f"The kinds of rows must be from 0 to {_NUM_KINDS - 1}, but are {sorted(counts)}.")

        agreed = self.agree_max([counts.get(kind, 0) for kind in range(_NUM_KINDS)])
        return {kind: n for kind, n in enumerate(agreed) if n > 0}


class LocalSync(GradSync):
    """One process: nothing to reduce."""


class DdpSync(GradSync):
    """DDP: all chunks run inside ``no_sync``, then one pass averages all gradients.

    DDP's own reducer would fire on the first backward pass whose forward pass
    ran outside ``no_sync``, and it leaves out the accumulated gradients of
    parameters that the last chunk does not use (the image tower, when that
    chunk holds texts). Reducing here has neither problem, and lets every chunk
    keep its graph. Nor has a chunk collectives, so each rank may keep what it likes.
    """

    can_reduce_chunks = False
    has_hooks = True

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = module

    def no_sync(self) -> AbstractContextManager[Any]:
        return _KeepFlag(self._module)

    def backward(self, *, last: bool) -> AbstractContextManager[Any]:
        return _KeepFlag(self._module)

    def finish(self) -> None:
        # False inside the user's own `no_sync`, while gradients accumulate.
        if self._module.require_backward_grad_sync:
            ignored = self._module.parameters_to_ignore
            parameters = [p for name, p in self._module.module.named_parameters() if name not in ignored]
            average_gradients(parameters, self._module.process_group)


class _KeepFlag:
    """``DistributedDataParallel.no_sync`` that restores the flag that it found.

    With a static graph, it also keeps DDP from queueing the reduction of the
    first step, which ``no_sync`` does not.
    """

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = module
        self._before: dict[str, bool] = {}

    def __enter__(self) -> None:
        for name, value in (("require_backward_grad_sync", False), ("_static_graph_delay_allreduce_enqueued", True)):
            if name in vars(self._module):
                self._before[name] = getattr(self._module, name)
                setattr(self._module, name, value)

    def __exit__(self, *error: object) -> None:
        for name, value in self._before.items():
            setattr(self._module, name, value)


class FsdpSync(GradSync):
    """FSDP2: the last backward pass of a step reduces and scatters what all of them accumulated."""

    runs_in_step = True
    shares_casts = False
    has_hooks = True

    def __init__(self, module: FSDPModule) -> None:
        self._module = module

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        self._module.set_requires_gradient_sync(last or self.reduces_chunks)
        self._module.set_is_last_backward(last)

        if last and not self.reduces_chunks:
            self._unify_gradient_types()

        try:
            yield
        finally:
            self._module.set_requires_gradient_sync(True)
            self._module.set_is_last_backward(True)

    def _unify_gradient_types(self) -> None:
        """Let all parameters of a group have accumulated gradients, if some have.

        In mixed precision accumulated gradients are float32. Gradients of
        parameters that only the last chunk uses, for example one tower's, are not,
        and FSDP2 refuses to reduce both together.
        """
        root: Any = self._module  # Also a `Module`, which its type does not say.
        for module in root.modules():
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None

            params = [p for p in group.fsdp_params if p.sharded_param.requires_grad] if group is not None else []
            if all(p.unsharded_accumulated_grad is None for p in params):
                continue

            for p in params:
                if p.unsharded_accumulated_grad is None and p.reduce_dtype not in (None, p.param_dtype):
                    device = p.sharded_param.device
                    p.unsharded_accumulated_grad = torch.zeros(p._orig_size, dtype=p.reduce_dtype, device=device)

    def agree_max(self, values: list[int]) -> list[int]:
        return all_max(values, None)  # Tensor and replica parallel ranks run the same chunks as well.


def grad_sync_of(encoder: Callable[..., Any]) -> GradSync:
    """Return how the gradients of ``encoder`` are reduced.

    The encoder is a DDP or FSDP2 module, or a module, function or method that
    uses one, also one that is held in a dict, a list, a tuple or a dataclass.

    :raises ValueError: it uses several.
    :raises TypeError: it uses FSDP1, which cannot accumulate gradients over chunks.
    """
    sync = _data_parallel_sync(encoder)
    split = next(find_reachable(encoder, _is_split), None)
    if split is not None:
        sync.split_over(split.tp_gang.as_process_group())
    return sync


def _data_parallel_sync(encoder: Callable[..., Any]) -> GradSync:
    found = list({id(m): m for m in find_reachable(encoder, _is_data_parallel)}.values())
    if len(found) > 1:
        raise ValueError(
            f"The encoder uses {len(found)} DDP or FSDP2 modules. Give each an encoder of its own, which holds no dict"
            " or list with the others."
        )

    if not found:
        return LocalSync()
    if isinstance(found[0], FullyShardedDataParallel):
        raise TypeError("FSDP1 is not supported. Use FSDP2 (`torch.distributed.fsdp.fully_shard`).")

    return DdpSync(found[0]) if isinstance(found[0], DistributedDataParallel) else FsdpSync(found[0])


def _is_data_parallel(module: Any) -> bool:
    return isinstance(module, (DistributedDataParallel, FSDPModule, FullyShardedDataParallel))


def _is_split(module: Any) -> bool:
    """Whether this is one of fairseq2's layers that are split over tensor parallel ranks."""
    return isinstance(module, Module) and getattr(getattr(module, "tp_gang", None), "size", 1) > 1


_ROUNDS: Final = 3
"""How often a call that waits for the end of a backward pass is put behind those that wait as well.

DDP reduces in such a call, which with a static graph comes from another.
"""


def after_backward(function: Callable[[], None], rounds: int = _ROUNDS) -> None:
    """Call ``function`` at the end of the backward pass that is running, after DDP and FSDP2 have reduced theirs."""
    call = function if rounds == 0 else lambda: after_backward(function, rounds - 1)
    Variable._execution_engine.queue_callback(call)


def average_gradients(parameters: Sequence[Parameter], group: ProcessGroup | None = None) -> None:
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

        for grad, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket])):
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
        return _GatherRows.apply(x, list(counts), self._group, self.rank)  # type: ignore[no-any-return, no-untyped-call]


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
        # A copy, because other nodes of the graph may hold the same tensor.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        start = sum(ctx.counts[: ctx.rank])
        return grad[start : start + ctx.counts[ctx.rank]].clone(), None, None, None

"""State that a second forward pass must see as the first did: random numbers and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor


class RngState:
    """The state of the random number generators of the CPU and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def set(self) -> None:
        """Go back to this state."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Go back to this state; afterwards the generators are as they were before."""
        devices = [self._device] if self._cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            self.set()
            yield


class Autocast:
    """The autocast setting at construction, to be entered again later.

    :param cache: whether chunks may share the casts of weights. Not with FSDP2:
        a cast that an earlier chunk made is older than what tells FSDP2 in the
        backward pass that a layer of this chunk is done, so the gradient would come
        too late and be lost.
    """

    def __init__(self, device: torch.device, *, cache: bool) -> None:
        self._type = device.type
        self._cache = cache
        self._enabled = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)

    def entered(self) -> AbstractContextManager[Any]:
        # Where it was off it must be turned off: the backward pass may run inside an autocast of its own.
        return torch.autocast(self._type, dtype=self._dtype, enabled=self._enabled, cache_enabled=self._cache)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory, on whatever device."""
    # On CPUs it is a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass, each storage once.

    Parameters are not counted: they exist anyway.

    :param casts: whether to count the casts of parameters that autocast makes,
        unless all chunks share them.
    """

    def __init__(self, *, casts: bool = False) -> None:
        self._casts = casts
        self._seen: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._seen.values())

    def measuring(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if not isinstance(base, torch.nn.Parameter) and (self._casts or not _is_cast_weight(base)):
            storage = tensor.untyped_storage()
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def _is_cast_weight(tensor: Tensor) -> bool:
    node = tensor.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return False
    source = node.next_functions[0][0]
    return source is not None and isinstance(getattr(source, "variable", None), torch.nn.Parameter)

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
    """The autocast setting at construction, to be entered again later."""

    def __init__(self, device: torch.device) -> None:
        self._type = device.type
        self._enabled = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)

    def entered(self) -> AbstractContextManager[Any]:
        # Where it was off it must be turned off: the backward pass may run inside an autocast of its own.
        return torch.autocast(self._type, dtype=self._dtype, enabled=self._enabled)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no memory, on whatever device."""
    # On CPUs it is a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass, each storage once.

    Parameters are not counted: they exist anyway. Nor are their casts under
    autocast, which all chunks share.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._seen.values())

    def measuring(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if not _is_weight(base):
            storage = tensor.untyped_storage()
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor


def _is_weight(tensor: Tensor) -> bool:
    if isinstance(tensor, torch.nn.Parameter):
        return True
    node = tensor.grad_fn
    if node is None or node.name() != "ToCopyBackward0":
        return False
    source = node.next_functions[0][0]
    return source is not None and isinstance(getattr(source, "variable", None), torch.nn.Parameter)

"""State that a second forward pass must see as the first did: random numbers and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ContextManager

import torch
from torch import Tensor


class RngState:
    """The state of the random number generators of the CPU and of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Go back to this state; afterwards the generators are as they were before."""
        devices = [self._device] if self._cuda is not None else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._cpu)
            if self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._device)
            yield


class Autocast:
    """The autocast setting at construction, to be entered again later."""

    def __init__(self, device: torch.device) -> None:
        self._type = device.type
        self._enabled = torch.is_autocast_enabled(device.type)
        self._dtype = torch.get_autocast_dtype(device.type)

    def entered(self) -> ContextManager[Any]:
        if not self._enabled:
            return nullcontext()
        return torch.autocast(self._type, dtype=self._dtype)


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass, each storage once.

    Parameters are not counted: they exist anyway.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    @property
    def total(self) -> int:
        return sum(self._seen.values())

    def measuring(self) -> ContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if not isinstance(base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

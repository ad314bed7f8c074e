"""State that a second forward pass must see as the first did: random numbers and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class RngState:
    """The state of the random number generators of the CPU and of one CUDA device.

    :param device: if it is no CUDA device, the current CUDA device counts: an
        encoder may move its inputs there and its embeddings back.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            device = torch.device("cuda", torch.cuda.current_device())

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
    """The autocast settings at construction, to be entered again later.

    :param device: the device of the inputs. The settings of the CPU and of CUDA are kept as well: encoders move inputs.
    :param cache: whether chunks may share the casts of weights. Not with FSDP2:
        a cast that an earlier chunk made is older than what tells FSDP2 in the
        backward pass that a layer of this chunk is done, so the gradient would come
        too late and be lost.
    """

    def __init__(self, device: torch.device, *, cache: bool) -> None:
        self._cache = cache
        types = {"cpu", device.type} | ({"cuda"} if torch.cuda.is_available() else set())
        self._settings = [(t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in sorted(types)]

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for device_type, enabled, dtype in self._settings:
                # If autocast was off it must be turned off: the backward pass may run inside another autocast.
                stack.enter_context(
                    torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=self._cache)
                )
            yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that memory ran out, on any device."""
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

"""Time, memory and hardware: what all benchmarks print their figures of."""

from __future__ import annotations

import ctypes
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

_LOWERED = "5"  # What resets a process's highest resident memory, see proc(5).


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took, and what it returned."""
    synchronize(device)
    began = time.perf_counter()
    value = function()
    synchronize(device)
    return time.perf_counter() - began, value


class PeakMemory:
    """The highest memory since :meth:`reset`, above that at construction.

    On GPUs, what torch allocated; on CPUs, the resident memory of the process
    as the kernel counts it (Linux only).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()
        self.start = self.total()

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        # What is free within the process would count as used.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_LOWERED)

    def total(self) -> int:
        """The peak, with what was in use at construction."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def peak(self) -> int:
        return self.total() - self.start


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the median of several measured rates of square matrix products, in FLOP per second."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return statistics.median(2 * size**3 / timed(device, lambda: a @ b)[0] for _ in range(5))


def encoder_flops(config: dict[str, Any], lengths: Sequence[int]) -> float:
    """Matrix products of a forward and a backward pass of a BERT-like encoder over texts of these lengths.

    :param config: the ``config.json`` of the model. The backward pass has twice the products of the forward pass.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    per_token = 2 * (4 * width**2 + 2 * width * inner)
    forward = sum(n * per_token + 4 * n**2 * width for n in lengths)
    return float(3 * config["num_hidden_layers"] * forward)


def hardware(device: torch.device) -> str:
    """Name what is measured on."""
    threads = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {threads}"
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{names[0] if names else platform.machine()}, {threads}"


class Table:
    """A Markdown table, printed row by row. The first column is text, the others are numbers."""

    def __init__(self, header: Sequence[str], widths: Sequence[int] = ()) -> None:
        """
        :param widths: the least widths of the columns, from the first on.
        """
        least = [*widths, *[3] * len(header)]
        self._widths = [max(len(name), width) for name, width in zip(header, least)]
        self.add(header)
        self.add(["-" * self._widths[0], *("-" * (w - 1) + ":" for w in self._widths[1:])])

    def add(self, row: Sequence[str]) -> None:
        cells = [row[0].ljust(self._widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], self._widths[1:]))]
        print("| " + " | ".join(cells) + " |", flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a whole table."""
    table = Table(header, [max((len(row[i]) for row in rows), default=0) for i in range(len(header))])
    for row in rows:
        table.add(row)

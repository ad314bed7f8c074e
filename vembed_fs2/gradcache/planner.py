"""Decides which rows are encoded together, and which graphs stay in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch

Budget: TypeAlias = "int | str | Literal['auto', 'all']"

_UNITS: Final = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

_KINDS: Final = {1: "texts", 2: "images", 3: "texts with images"}

# What "auto" may take of the memory that is free when training starts.
_AUTO_FRACTION: Final = 0.5


@dataclass(frozen=True)
class Chunk:
    """Rows that are encoded in one forward pass."""

    rows: tuple[int, ...]
    """Indices into all rows of the encoder. A row of a dummy chunk is encoded for its collectives only."""

    kind: int
    tokens: int
    """The cost with padding."""

    dummy: bool = False
    """If ``True``, the output is not used; it makes all ranks run the same number of chunks."""


def plan_chunks(
    costs: Sequence[int], kinds: Sequence[int], chunk_tokens: int, chunk_patches: int | None = None
) -> list[Chunk]:
    """Cut rows, sorted by cost, into chunks of at most ``chunk_tokens`` tokens with padding.

    Long rows come first, so that running out of memory shows at once. A row
    longer than ``chunk_tokens`` has a chunk of its own.

    :param chunk_patches: the limit of chunks with images; ``None`` if it is that of texts.
    """
    order = sorted(range(len(costs)), key=lambda i: (kinds[i], -costs[i], i))
    chunks: list[Chunk] = []
    start = 0
    while start < len(order):
        first = order[start]
        width = max(costs[first], 1)
        stop = start + 1
        size = chunk_patches if chunk_patches is not None and kinds[first] in (2, 3) else chunk_tokens
        limit = start + max(size // width, 1)
        while stop < min(limit, len(order)) and kinds[order[stop]] == kinds[first]:
            stop += 1
        chunks.append(Chunk(tuple(order[start:stop]), kinds[first], (stop - start) * width))
        start = stop
    return chunks


def match_counts(chunks: list[Chunk], counts: dict[int, int], costs: Sequence[int]) -> list[Chunk]:
    """Split chunks, or add dummies, until there are ``counts[kind]`` of each kind.

    :raises ValueError: there is no row of a kind that other ranks have.
    """
    matched: list[Chunk] = []
    for kind in sorted(counts):
        own = [c for c in chunks if c.kind == kind]
        if not own:
            raise ValueError(
                f"This rank has no row of {_KINDS.get(kind, f'kind {kind}')}, but other ranks have: the parts of a"
                " sharded model must run on all ranks. Use larger batches, rows that all hold the same, or DDP."
            )
        while len(own) < counts[kind]:
            largest = max(range(len(own)), key=lambda i: len(own[i].rows))
            own[largest : largest + 1] = _split(own[largest], costs)
        matched += own
    return matched


def _split(chunk: Chunk, costs: Sequence[int]) -> list[Chunk]:
    if len(chunk.rows) == 1:
        return [chunk, replace(chunk, dummy=True)]
    half = (len(chunk.rows) + 1) // 2
    parts = (chunk.rows[:half], chunk.rows[half:])
    return [Chunk(rows, chunk.kind, len(rows) * max(costs[r] for r in rows)) for rows in parts]


def count_kept(sizes: Sequence[int], budget: int) -> int:
    """Return how many chunks can keep their graphs, from the first on.

    The first are the most expensive to recompute. A prefix, so that neither the
    order of random numbers nor that of sums depends on the budget: a run gives
    the same weights whatever memory is free.

    :param sizes: the bytes of each chunk's graph, in the order of encoding.
    :param budget: bytes for activations.
    """
    left = budget
    for idx, size in enumerate(sizes):
        left -= size
        if left < 0:
            return idx
    return len(sizes)


def parse_budget(value: Budget, device: torch.device) -> int:
    """Convert ``0``, a number of bytes, ``"4GiB"``, ``"all"`` or ``"auto"`` to bytes.

    ``auto`` is half of the memory that is free now; on CPUs, of this process's
    share of it.

    :raises ValueError: ``value`` is none of these.
    """
    if value == "all":
        return 2**62
    if value == "auto":
        return int(_free_memory(device) * _AUTO_FRACTION)
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= 0:
            return value
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)):
        unit = _UNITS.get(match[2].upper())
        if unit is not None:
            return int(float(match[1]) * unit)
    raise ValueError(f"`activation_budget` must be 'auto', 'all', 0, or a size such as '4GiB', but is {value!r}.")


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    # The processes of one machine share its memory.
    return min(_available(), _container_headroom()) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as fp:
            fields = dict(line.split(":", 1) for line in fp)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4 * 2**30  # No way to ask (not Linux): assume little.


def _container_headroom() -> int:
    """What the control group of a container leaves; ``/proc/meminfo`` tells that of the whole machine."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (int(root.joinpath(name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in root.joinpath("memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**62  # No control group, or no limit ("max").
    return max(limit - used + int(stat.get("inactive_file", 0)), 0)

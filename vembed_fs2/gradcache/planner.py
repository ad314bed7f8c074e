"""Decides which rows are encoded together, and which graphs stay in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch

from vembed_fs2.embedding.batch import Profile

Budget: TypeAlias = "int | str | Literal['auto', 'all']"

_UNITS: Final = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

# The share that "auto" may take of the memory that is free when training starts.
_AUTO_FRACTION: Final = 0.5


@dataclass(frozen=True)
class Chunk:
    """Rows that are encoded in one forward pass."""

    rows: tuple[int, ...]
    """Indices into all rows of the encoder. None in a chunk that holds a blank row of the model's own."""

    kind: int

    tokens: int
    """The cost: tokens with padding, and patches."""

    dummy: bool = False
    """If ``True``, the output is not used; it makes all ranks run the same number of chunks."""


def plan_chunks(
    profile: Profile, chunk_tokens: int, chunk_patches: int | None = None, *, max_rows: int | None = None
) -> list[Chunk]:
    """Cut rows, sorted by cost, into chunks of at most ``chunk_tokens`` tokens with padding.

    Expensive rows come first, so that running out of memory shows at once. A row
    that is over a limit has a chunk of its own.

    :param chunk_patches: the most patches of a chunk; if ``None``, patches count as tokens.
    :param max_rows: the most rows of a chunk; any number if ``None``.
    """
    costs = profile.costs()
    order = sorted(range(len(costs)), key=lambda i: (profile.kinds[i], -costs[i], i))

    widths = _widths(profile)

    def fits(tokens: int, patches: int) -> bool:
        if chunk_patches is None:
            return tokens + patches <= chunk_tokens
        return tokens <= chunk_tokens and patches <= chunk_patches

    chunks: list[Chunk] = []
    rows: list[int] = []
    width = patches = 0
    for row in order:
        if rows:
            width = max(width, widths[row])
            patches += profile.patches[row]

            is_full = len(rows) == max_rows or not fits(width * (len(rows) + 1), patches)
            if is_full or profile.kinds[row] != profile.kinds[rows[0]]:
                chunks.append(_chunk(rows, profile, widths))
                rows = []

        if not rows:
            width, patches = widths[row], profile.patches[row]

        rows.append(row)

    if rows:
        chunks.append(_chunk(rows, profile, widths))

    return chunks


def _widths(profile: Profile) -> list[int]:
    """The tokens of each row; 1 for rows that hold nothing, which cost something as well."""
    return [tokens or (0 if patches else 1) for tokens, patches in zip(profile.tokens, profile.patches)]


def _chunk(rows: Sequence[int], profile: Profile, widths: Sequence[int]) -> Chunk:
    tokens = len(rows) * max(widths[row] for row in rows)
    return Chunk(tuple(rows), profile.kinds[rows[0]], tokens + sum(profile.patches[row] for row in rows))


def match_counts(chunks: list[Chunk], counts: dict[int, int], profile: Profile) -> list[Chunk]:
    """Split chunks, or add dummies, until there are ``counts[kind]`` of each kind.

    A kind that only other ranks have gets chunks without rows.
    """
    widths = _widths(profile)

    matched: list[Chunk] = []
    for kind in sorted(counts):
        own = [c for c in chunks if c.kind == kind] or [Chunk((), kind, 1, dummy=True)]
        while len(own) < counts[kind]:
            largest = max(range(len(own)), key=lambda i: len(own[i].rows))
            own[largest : largest + 1] = _split(own[largest], profile, widths)
        matched += own

    return matched


def _split(chunk: Chunk, profile: Profile, widths: Sequence[int]) -> list[Chunk]:
    if len(chunk.rows) < 2:
        return [chunk, replace(chunk, dummy=True)]

    half = (len(chunk.rows) + 1) // 2
    return [_chunk(rows, profile, widths) for rows in (chunk.rows[:half], chunk.rows[half:])]


def count_kept(sizes: Sequence[int], budget: int) -> int:
    """Return how many chunks can keep their graphs, from the first on.

    The first are the most expensive to recompute. A prefix, so that neither the
    order of random numbers nor the order of sums depends on the budget: a run gives
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
    """The memory that a container's control group leaves; ``/proc/meminfo`` describes the whole machine."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (int(root.joinpath(name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in root.joinpath("memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**62  # No control group, or no limit ("max").

    return max(limit - used + int(stat.get("inactive_file", 0)), 0)

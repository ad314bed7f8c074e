"""Runs a function in several processes connected by gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.forks import FORKS, free_port, gang_environment


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` in ``world_size`` processes; return what each returned."""
    port = free_port()
    results = FORKS.SimpleQueue()
    processes = mp.start_processes(
        _run, (world_size, port, function, args, results), nprocs=world_size, join=False, start_method="forkserver"
    )
    by_rank: dict[int, Any] = {}
    # Read while they run: a process with a large result does not end before it is read.
    while not processes.join(timeout=0.1):
        while not results.empty():
            rank, result = results.get()
            by_rank[rank] = result
    while not results.empty():
        rank, result = results.get()
        by_rank[rank] = result
    return [by_rank[r] for r in range(world_size)]


def _run(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(gang_environment(rank, world_size, port))
    results.put((rank, function(rank, *args)))

"""Runs a function in several processes connected by gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` in ``world_size`` processes; return what each returned."""
    port = free_port()
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = mp.spawn(_run, (world_size, port, function, args, results), nprocs=world_size, join=False)
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


def free_port() -> int:
    """A port that nothing listens on, and that no connection of gloo or of another test gets until it is used."""
    # Below those that the kernel hands out, and apart for each process.
    first = 10_000 + os.getpid() * 37 % 20_000
    for port in range(first, first + 100):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"No port from {first} on is free.")


def _run(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    results.put((rank, function(rank, *args)))

"""Processes for tests, forked from one that has imported everything: half of a short one is spent on imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TIMEOUT = 300

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "vembed_fs2.recipes.train.recipe",
        "vembed_fs2.inference.embedder",
        "torch.distributed.fsdp",
        "pytest",
        "hypothesis",
    ]
)


def gang_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher says to the processes of a gang."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


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


@dataclass
class Result:
    """What a command returned and printed."""

    status: int
    output: str
    """Both stdout and stderr."""

    def expect(self, status: int) -> Result:
        assert self.status == status, self.output[-4000:]
        assert status == 0 or "Traceback" not in self.output, self.output[-4000:]
        return self


def run_forks(
    function: Callable[..., object], *args: Any, environments: Sequence[Mapping[str, str]], cwd: Path | None = None
) -> Result:
    """Call ``function(*args)`` in a process for each environment, and wait for all, or until one fails."""
    with TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"{rank}" for rank in range(len(environments))]
        processes = [fork(function, *args, env=env, log=log, cwd=cwd) for env, log in zip(environments, outputs)]
        status = _wait(processes)
        printed = "".join(output.read_text(errors="replace") for output in outputs if output.exists())
        assert status is not None, f"took too long:\n{printed[-4000:]}"
        return Result(status, printed)


def fork(
    function: Callable[..., object],
    *args: Any,
    env: Mapping[str, str],
    log: Path,
    cwd: Path | None = None,
    in_own_group: bool = False,
) -> BaseProcess:
    """Start ``function(*args)`` as a program of its own: with this environment only, and printing to ``log``."""
    setting = dict(env), str(cwd or Path.cwd()), str(log), in_own_group
    process = FORKS.Process(target=_be_a_program, args=(function, args, *setting))
    process.start()
    return process


def _be_a_program(
    function: Callable[..., object], args: Sequence[Any], env: dict[str, str], cwd: str, log: str, in_own_group: bool
) -> None:
    if in_own_group:
        os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.clear()
    os.environ.update(env)
    if (cache := env.get("HF_HUB_CACHE")) is not None:
        from huggingface_hub import constants

        constants.HF_HUB_CACHE = cache  # Which it reads when it is imported.
    os.chdir(cwd)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    function(*args)


def _wait(processes: Sequence[BaseProcess]) -> int | None:
    """Wait for all, or until one fails. *Returns:* its status; ``None`` if they took too long."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while time.monotonic() < deadline:
            statuses = [process.exitcode for process in processes]
            if any(statuses) or None not in statuses:
                return next(filter(None, statuses), 0)
            connection.wait([p.sentinel for p in processes if p.exitcode is None], timeout=1.0)
        return None
    finally:
        for process in processes:
            process.kill()
            process.join()

"""Starts the processes of a gang on this machine, and makes them end as one.

This is what ``torchrun --standalone`` does, with three differences. Ctrl-C and
SIGTERM reach the processes once, and they get the time that a checkpoint takes;
torchrun kills them after 30 seconds. A user's mistake is printed once, without
torchrun's stack trace. And no process outlives the others.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Final

_CLAIM: Final = "VEMBED_ERROR_CLAIM"
"""Names the file that the process creates that reports an error; all others keep silent."""

_GRACE: Final = 5.0
"""Seconds that the others get to end by themselves after one process has failed."""

_POLL: Final = 0.05

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""The signals that end a run in good order; the launcher passes them on."""

RESUME: Final = "Checkpoints that were complete are intact; run the same command again to resume."


def run_processes(command: Sequence[str], count: int, *, advice: str = RESUME, stdout: int | None = None) -> int:
    """Run ``command`` as ``count`` ranks and return their exit status.

    :param advice: what to do after a process has failed without saying why.
    :param stdout: the file that they print to; this process's by default.
    :returns: 0 if all succeeded, else the status of the first that failed; 128
        plus the number of the signal for one that was killed.
    """
    with TemporaryDirectory(prefix="vembed_") as folder:
        claim = Path(folder) / "error"

        gang = _Gang(command, count, {**os.environ, **_environment(count), _CLAIM: str(claim)}, stdout)
        previous = {s: signal.signal(s, gang.forward) for s in _STOP_SIGNALS}
        try:
            rank, status = gang.wait()
        finally:
            gang.kill()
            for signum, handler in previous.items():
                signal.signal(signum, handler)

        if claim.exists():
            return int(claim.read_text() or 1)

        # A process that Ctrl-C or another signal has stopped needs no explanation.
        if status and not (gang.signalled and -status in _STOP_SIGNALS):
            _explain(rank, status, gang.deferred_error(rank), advice)

    return 128 - status if status < 0 else status


def claim_error(status: int) -> bool:
    """Whether this process is to print an error, being the first of its gang to have one."""
    file = os.environ.get(_CLAIM)
    if file is None:
        return True

    try:
        # Complete or not at all: the launcher reads the status from it.
        own = Path(f"{file}.{os.getpid()}")
        own.write_text(str(status))
        os.link(own, file)
    except FileExistsError:
        return False
    except OSError:
        return True

    return True


def is_error_claimed() -> bool:
    """Whether another process of the gang has printed an error; what this one sees is its consequence."""
    file = os.environ.get(_CLAIM)
    return file is not None and os.path.exists(file)


def defer_error(text: str) -> bool:
    """Leave an error to the launcher, which prints it if no process has a better one. *Returns:* whether it will."""
    file = os.environ.get(_CLAIM)
    if file is None:
        return False

    try:
        _deferred_file(file, os.environ["RANK"]).write_text(text)
    except OSError:
        return False

    return True


def _deferred_file(claim: str, rank: int | str) -> Path:
    return Path(f"{claim}.rank_{rank}")


def _environment(count: int) -> dict[str, str]:
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(s.getsockname()[1])

    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // count, 1))

    return environment


class _Gang:
    """The processes, by rank."""

    def __init__(self, command: Sequence[str], count: int, environment: dict[str, str], stdout: int | None) -> None:
        self.signalled = False
        self._claim = environment[_CLAIM]
        self._processes = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=stdout,
                preexec_fn=_stop_with_parent,
            )
            for rank in range(count)
        ]

    def forward(self, signum: int, frame: FrameType | None) -> None:
        """Pass a signal on. Those that got it from the terminal already take it for the same one."""
        self.signalled = True
        for process in self._processes:
            process.send_signal(signum)

    def wait(self) -> tuple[int, int]:
        """Wait for the end of all. *Returns:* the rank that failed first, and its status; 0 and 0 if none did."""
        failed: tuple[int, int] | None = None
        deadline = float("inf")
        while True:
            running = None in [process.poll() for process in self._processes]

            # One that was asked to stop, or only lost its connection to another, may end before the one that failed.
            if failed is None or failed[1] >= 128 or self.deferred_error(failed[0]) is not None:
                failed = self._find_failed()
            if not running:
                return failed or (0, 0)

            # A process that was asked to stop has not failed: the others are about to end as well.
            if failed is not None and failed[1] < 128:
                deadline = min(deadline, time.monotonic() + _GRACE)

            if failed is not None and time.monotonic() > deadline:
                self.kill()
                return failed

            time.sleep(_POLL)

    def _find_failed(self) -> tuple[int, int] | None:
        failed = [(rank, p.returncode) for rank, p in enumerate(self._processes) if p.returncode]
        # Those that were asked to stop, and those that lost another, come last; one that was killed comes first.
        return min(failed, key=lambda f: (f[1] >= 128, self.deferred_error(f[0]) is not None, f[1] > 0), default=None)

    def deferred_error(self, rank: int) -> str | None:
        """The error that a process has left to the launcher."""
        try:
            return _deferred_file(self._claim, rank).read_text()
        except FileNotFoundError:
            return None

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _stop_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher is killed: no run may go on unseen and write to its folder."""
    if sys.platform != "linux":
        return

    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _explain(rank: int, status: int, deferred: str | None, advice: str) -> None:
    if status >= 128:
        return  # It was asked to stop, and did.

    if status < 0:
        name = signal.Signals(-status).name
        hint = " Was the memory full?" if -status == signal.SIGKILL else ""
        text = f"the process of rank {rank} was killed by {name}.{hint}"
    elif deferred is not None:
        text = f"{deferred} logs/rank_{rank}.log says more."
    elif rank != 0:
        text = f"the process of rank {rank} failed; logs/rank_{rank}.log says why."
    else:
        return  # Rank 0 logs to the console.

    print(f"error: {text} {advice}".rstrip(), file=sys.stderr)

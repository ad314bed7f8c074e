"""Starts the processes of a gang on this machine, and makes them end as one.

This is what ``torchrun --standalone`` does, with three differences. Ctrl-C and
SIGTERM reach the processes once, and they get the time that a checkpoint takes;
torchrun kills them after 30 seconds. A user's mistake is printed once, without
torchrun's stack trace. And no process outlives the others.
"""

from __future__ import annotations

import codecs
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, Final, NamedTuple

_CLAIM: Final = "VEMBED_ERROR_CLAIM"
"""Names the file that the process creates that reports an error; all others keep silent."""

_RETURNS: Final = "VEMBED_ERROR_RETURNS"
"""Set if the launcher hands the error on, so that no process is to print it."""

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
    outcome = _run(command, _gang_environments(count), advice, stdout=stdout)
    if outcome.explanation is not None:
        print(f"error: {outcome.explanation}", file=sys.stderr)
    return outcome.status


class Outcome(NamedTuple):
    """How processes ended."""

    status: int
    """0 if all succeeded, else as :func:`run_processes` returns it."""

    report: str = ""
    """What the process that failed has left for the caller; see :func:`claim_error`."""

    explanation: str | None = None
    """Why a process failed that could not say so itself."""

    signum: int = 0
    """The signal that this process received meanwhile, and passed on."""


def call_processes(
    command: Sequence[str], count: int | None, *, advice: str = RESUME, echo: Callable[[str], object] | None = None
) -> Outcome:
    """Run ``command`` as :func:`run_processes` does, for a caller in Python: errors are returned, not printed.

    May be called in any thread; but only the main thread can pass signals on.

    :param count: the number of ranks; ``None`` for one process, with this process's own environment.
    :param echo: gets what the processes print, in the thread of the caller. By default they print to this process's
        own streams.
    """
    environments = [{}] if count is None else _gang_environments(count)
    return _run(command, environments, advice, returns=True, echo=echo)


def _run(
    command: Sequence[str],
    environments: Sequence[dict[str, str]],
    advice: str,
    *,
    stdout: int | None = None,
    returns: bool = False,
    echo: Callable[[str], object] | None = None,
) -> Outcome:
    with TemporaryDirectory(prefix="vembed_") as folder:
        claim = Path(folder) / "error"
        common = {name: value for name, value in os.environ.items() if name != _RETURNS}
        common |= {_CLAIM: str(claim), **({_RETURNS: "1"} if returns else {})}

        gang = _Gang(command, [{**common, **environment} for environment in environments], claim, stdout, echo)
        with _signals_to(gang.forward):
            try:
                rank, status = gang.wait()
            finally:
                gang.kill()

        if claim.exists():
            claimed, _, report = claim.read_text(encoding="utf-8").partition("\n")
            return Outcome(int(claimed or 1), report, signum=gang.signum)

        explanation = None
        # A process that Ctrl-C or another signal has stopped needs no explanation.
        if status and not (gang.signum and -status in _STOP_SIGNALS):
            explanation = _explain(rank, status, gang.deferred_error(rank), advice)

    return Outcome(128 - status if status < 0 else status, explanation=explanation, signum=gang.signum)


@contextmanager
def _signals_to(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Have the signals that stop a run handled; only in the main thread, where Python lets one do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    previous: dict[int, Any] = {s: signal.signal(s, handler) for s in _STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, before in previous.items():
            if before is not None:  # Else it was not installed by Python.
                signal.signal(signum, before)


def claim_error(status: int, report: str = "") -> bool:
    """Whether this process is to print an error, being the first of its gang to have one.

    :param report: the error for a caller in Python, which prints it as it likes.
    """
    file = os.environ.get(_CLAIM)
    if file is None:
        return True

    try:
        # Complete or not at all: the launcher reads the status from it.
        own = Path(f"{file}.{os.getpid()}")
        own.write_text(f"{status}\n{report}", encoding="utf-8")
        os.link(own, file)
    except FileExistsError:
        return False
    except OSError:
        return True

    return _RETURNS not in os.environ


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
        _deferred_file(file, os.environ.get("RANK", 0)).write_text(text)
    except OSError:
        return False

    return True


def _deferred_file(claim: str, rank: int | str) -> Path:
    return Path(f"{claim}.rank_{rank}")


def _gang_environments(count: int) -> list[dict[str, str]]:
    """What the processes of a gang are told, by rank."""
    environment = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(s.getsockname()[1])

    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // count, 1))

    return [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class _Echo:
    """What processes print, read from a pipe in the thread that waits for them."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._source, self.target = os.pipe()
        os.set_blocking(self._source, False)

    def wait(self, seconds: float) -> None:
        """Pass on what is printed within some time; return at once when something was."""
        if select.select([self._source], [], [], seconds)[0] and not self._read():
            time.sleep(seconds)  # No process prints any more, but one still runs.

    def _read(self) -> bool:
        try:
            data = os.read(self._source, 2**16)
        except BlockingIOError:
            return False

        if text := self._decoder.decode(data):
            self._write(text)
        return bool(data)

    def close(self) -> None:
        """Pass on what is left."""
        while self._read():
            pass
        os.close(self._source)


class _Gang:
    """The processes, by rank."""

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[dict[str, str]],
        claim: Path,
        stdout: int | None,
        echo: Callable[[str], object] | None,
    ) -> None:
        self.signum = 0
        self._claim = str(claim)
        self._echo = None if echo is None else _Echo(echo)

        stderr = None
        if self._echo is not None:
            stdout = stderr = self._echo.target
            environments = [{**environment, "PYTHONUNBUFFERED": "1"} for environment in environments]

        self._processes = [
            subprocess.Popen(command, env=environment, stdout=stdout, stderr=stderr, preexec_fn=_stop_with_parent)
            for environment in environments
        ]
        if self._echo is not None:
            os.close(self._echo.target)

    def forward(self, signum: int, frame: FrameType | None) -> None:
        """Pass a signal on. Those that got it from the terminal already take it for the same one."""
        self.signum = self.signum or signum
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

            if self._echo is None:
                time.sleep(_POLL)
            else:
                self._echo.wait(_POLL)

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
        """End what still runs, and pass on the last that was printed."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()

        if self._echo is not None:
            echo, self._echo = self._echo, None
            echo.close()


# Found before a process is forked: a caller's other threads may hold locks that loading a library needs.
_C: Final = ctypes.CDLL(None)


def _stop_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher is killed: no run may go on unseen and write to its folder."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        _C.prctl(set_parent_death_signal, signal.SIGTERM)


def _explain(rank: int, status: int, deferred: str | None, advice: str) -> str | None:
    if status >= 128:
        return None  # It was asked to stop, and did.

    if status < 0:
        name = signal.Signals(-status).name
        hint = " Was the memory full?" if -status == signal.SIGKILL else ""
        text = f"the process of rank {rank} was killed by {name}.{hint}"
    elif deferred is not None:
        text = f"{deferred} logs/rank_{rank}.log says more."
    elif rank != 0:
        text = f"the process of rank {rank} failed; logs/rank_{rank}.log says why."
    else:
        return None  # Rank 0 logs to the console.

    return f"{text} {advice}".rstrip()

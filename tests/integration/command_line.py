"""Runs the command line as a user does, interrupts it, and reads what a run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FAIRSEQ2 = str(Path(sys.executable).with_name("fairseq2"))

TIMEOUT = 300


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


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200", **variables}


def run(*arguments: object, program: Sequence[str] = (FAIRSEQ2, "vembed"), **variables: str) -> Result:
    """Run ``fairseq2 vembed`` with arguments, and environment variables."""
    command = [*program, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT
    )
    return Result(done.returncode, done.stdout.decode(errors="replace"))


def interrupt(
    arguments: Sequence[object], when: Callable[[], bool], how: Callable[[subprocess.Popen[bytes]], None], log: Path
) -> Result:
    """Run ``fairseq2 vembed`` in a process group of its own, and do ``how`` to it as soon as ``when`` is true."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [FAIRSEQ2, "vembed", *map(str, arguments)],
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while not when():
                assert process.poll() is None, f"ended too early:\n{log.read_text()[-4000:]}"
                assert time.monotonic() < deadline, f"took too long:\n{log.read_text()[-4000:]}"
                time.sleep(0.002)
            how(process)
            status = process.wait(TIMEOUT)
        finally:
            kill_group(process)
    return Result(status, log.read_text(errors="replace"))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the command and all its processes; returns when they are gone."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(TIMEOUT)
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        except PermissionError:
            pass
        time.sleep(0.01)


def metrics(run_dir: Path, name: str = "Loss") -> dict[int, float]:
    """A metric by step, as the run recorded it."""
    file = run_dir / "metrics" / "train.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["Step"]: row[name] for row in rows}


def steps(run_dir: Path) -> list[int]:
    """The steps that have a complete checkpoint."""
    folders = run_dir.joinpath("checkpoints").glob("step_*")
    return sorted(int(f.name[5:]) for f in folders if f.name[5:].isdigit())


def weights(run_dir: Path) -> dict[str, Tensor]:
    """The last weights of a run of one process or DDP."""
    step = run_dir / "checkpoints" / f"step_{steps(run_dir)[-1]}"
    (file,) = step.joinpath("model").rglob("*.pt")
    state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def assert_same_weights(left: Path, right: Path) -> None:
    """Bit for bit."""
    a, b = weights(left), weights(right)
    assert steps(left)[-1] == steps(right)[-1]
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:3]}"

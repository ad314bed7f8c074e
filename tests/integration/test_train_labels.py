"""Training and evaluation on folders of classes, and on rows of texts and labels."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from tests.integration.command_line import assert_same_weights, metrics, run
from tests.integration.conftest import WORDS
from vembed_fs2 import Embedder, load_model
from vembed_fs2.files import write_json

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Folders ``train`` and ``valid`` with a folder for each digit, and an image processor."""
    folder = tmp_path_factory.mktemp("classes")
    images: dict[str, list[str]] = defaultdict(list)
    for line in digits.joinpath("train.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["positive_image"].endswith("-0.png"):
            images[row["label"]].append(row["positive_image"])
    for label, names in images.items():
        for part, own in (("train", names[: 9 + int(label)]), ("valid", names[20:28])):
            folder.joinpath(part, label).mkdir(parents=True)
            for name in own:
                shutil.copy(digits / name, folder / part / label)
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 16, "width": 16}}
    folder.joinpath("processor").mkdir()
    write_json(folder / "processor" / "preprocessor_config.json", config)
    return folder


def command(folder: Path, out: Path, *options: str) -> list[object]:
    return [
        "train", out, "--no-rich", "--config", "model.family=vembed_vit", "model.arch=dinov2_tiny",
        "model.config_overrides.head.pooling=mean", f"processor.path={folder}/processor",
        f"dataset.paths=[{folder}/train]", f"valid.paths=[{folder}/valid]", "dataset.batch_size=32",
        f"regime.num_steps={STEPS}", "regime.publish_metrics_every_n_steps=1", "optimizer.config.lr=0.003",
        "lr_scheduler.config={decay: constant, warmup_ratio: 0}", "trainer.mixed_precision.mode=off",
        "grad_cache.chunk_tokens=150", "regime.score_metric=hit@1", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on one process, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "one"
    return out, run(*command(folder, out)).expect(0).output


def test_classes_are_learned_and_validated(one: tuple[Path, str]) -> None:
    out, printed = one
    losses = metrics(out)
    assert np.mean([losses[step] for step in range(STEPS - 2, STEPS + 1)]) < losses[1]
    log = (out / "logs" / "rank_0.log").read_text()
    assert "Batches hold about 4 rows of a label together (`dataset.rows_per_label`): 10 labels, 0 of one" in log
    lines = [json.loads(line) for line in (out / "metrics" / "valid.jsonl").read_text().splitlines()]
    assert 0.1 < lines[-1]["Hit@1"] <= 1.0
    assert re.search(r"Step \d+: Hit@1 0\.\d+, .*\(best\)", printed)


def test_two_processes_train_as_one(one: tuple[Path, str], folder: Path, tmp_path: Path) -> None:
    run(*command(folder, tmp_path / "two", "dataset.batch_size=16"), num_processes=2).expect(0)
    for name in ("Loss", "Accuracy", "Negatives per Query"):
        assert metrics(tmp_path / "two", name) == pytest.approx(metrics(one[0], name), rel=1e-4, abs=1e-4), name
    expected, got = load_model(one[0]).state_dict(), load_model(tmp_path / "two").state_dict()
    for name, value in expected.items():
        assert name.endswith("k_proj.bias") or float((value - got[name]).abs().max()) < 1e-4, name


def test_a_run_is_resumed_exactly(one: tuple[Path, str], folder: Path, tmp_path: Path) -> None:
    for steps in (7, STEPS):  # An epoch has four.
        run(*command(folder, tmp_path / "run", f"regime.num_steps={steps}")).expect(0)
    assert_same_weights(one[0], tmp_path / "run")


def test_evaluation_is_that_of_stanford_online_products(one: tuple[Path, str], folder: Path, tmp_path: Path) -> None:
    """Recall@K there: the share of images with one of their class among the K nearest others."""
    run("evaluate", one[0], folder / "valid", "--output", tmp_path / "results.json").expect(0)
    results = json.loads((tmp_path / "results.json").read_text())["metrics"]

    files = sorted(folder.glob("valid/*/*.png"))
    x = Embedder.load(one[0]).encode_document(files).astype(np.float64)
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    labels = np.array([file.parent.name for file in files])
    ranked = labels[np.argsort(-similarity, axis=1)[:, :-1]] == labels[:, None]
    for k in (1, 5, 10, 100, 1000):
        assert results[f"hit@{k}"] == pytest.approx(ranked[:, :k].any(1).mean()), k
    assert results["num_queries"] == results["num_documents"] == len(files) == 80
    assert results["num_queries_without_relevant"] == 0

    lines = [json.loads(line) for line in (one[0] / "metrics" / "valid.jsonl").read_text().splitlines()]
    assert lines[-1]["Hit@1"] == pytest.approx(results["hit@1"])


@pytest.mark.parametrize(
    "options",
    [
        ["loss.name=multi_positive", "loss.config.learn_temperature=true"],
        ["loss.name=sigmoid"],
        ["loss.name=triplet", "loss.config.mining=all"],
        [
            "loss.name=matryoshka", "loss.config.dims=[8, 32]",
            "loss.config.loss={name: combined, config: {losses: [{name: infonce}, {name: spread, weight: 0.1}]}}",
        ],
    ],
    ids=["multi_positive", "sigmoid", "triplet", "matryoshka"],
)  # fmt: skip
def test_texts_and_labels(options: list[str], bert_folder: Path, tmp_path: Path) -> None:
    """Beside rows of their label stand one that has none, and pairs."""
    rows = [{"query": f"{word} {other}", "label": word} for word in WORDS[:4] for other in WORDS[4:10]]
    rows += [{"query": "heavy light", "label": "single"}, {"query": "red red", "positive": "red", "label": "red"}]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "train", tmp_path / "run", "--no-rich", "--config", f"model.path={bert_folder}", f"dataset.paths=[{file}]",
        "dataset.batch_size=26", "regime.num_steps=4", "regime.publish_metrics_every_n_steps=1",
        "trainer.mixed_precision.mode=off", *options,
    ).expect(0)  # fmt: skip
    assert all(np.isfinite(list(metrics(tmp_path / "run").values())))
    alone = metrics(tmp_path / "run", "Queries without Positive (%)")
    assert list(alone.values()) == pytest.approx([1 / 26] * 4)

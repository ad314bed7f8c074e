"""A model with a vector per token: trained, validated, evaluated and loaded, on one process and on two."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.command_line import metrics, run
from tests.integration.conftest import WORDS
from vembed_fs2 import Embedder, load_model
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.evaluation import evaluate_embedder, task_from_examples
from vembed_fs2.files import write_json
from vembed_fs2.formats.folder import HEAD_FILE

VALID = ("Recall@1", "Recall@5", "Recall@10", "MRR", "nDCG@10")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 rows: two to four words, and some of them with others between; one document is longer than all others."""
    draw = random.Random(0)
    rows = []
    for idx in range(80):
        words = draw.sample(WORDS, draw.randint(2, 4))
        fillers = draw.choices(WORDS, k=17 if idx == 6 else draw.randint(1, 5))
        document = [*words[1:], *fillers]
        draw.shuffle(document)
        rows.append({"query": " ".join(words), "positive": " ".join(document)})
    file = tmp_path_factory.mktemp("texts") / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, texts: Path) -> dict[str, Path]:
    """12 steps of 16 rows on one process, and on two by DDP and FSDP2."""
    folder = tmp_path_factory.mktemp("runs")
    ways = {
        "one": (16, 1, "ddp"),
        "ddp": (8, 2, "ddp"),
        "fsdp": (8, 2, "fsdp"),
    }
    for name, (batch_size, num_processes, parallelism) in ways.items():
        run(
            "train", folder / name, "--no-rich", "--config", f"trainer.data_parallelism={parallelism}",
            f"model.path={bert_folder}", "model.config_overrides.head.pooling=none",
            "model.config_overrides.dropout_p=0",
            "model.config_overrides.attn_dropout_p=0", "loss.config.similarity=maxsim", "loss.config.temperature=1",
            f"dataset.paths=[{texts}]", f"dataset.batch_size={batch_size}", f"valid.paths=[{texts}]",
            "valid.batch_size=5", "grad_cache.chunk_tokens=64", "grad_cache.activation_budget=0",
            "regime.num_steps=12", "regime.validate_at_start=true", "regime.validate_every_n_steps=12",
            "regime.publish_metrics_every_n_steps=1", "optimizer.config.lr=0.003", "trainer.mixed_precision.mode=off",
            num_processes=num_processes,
        ).expect(0)  # fmt: skip
    return {name: folder / name for name in ways}


def valid_metrics(run_dir: Path) -> list[dict[str, float]]:
    """What each validation reported."""
    (file,) = run_dir.joinpath("metrics").glob("valid*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_training_improves_the_metrics(runs: dict[str, Path]) -> None:
    before, *_, after = valid_metrics(runs["one"])

    assert before["Recall@10"] < 0.4
    assert after["Recall@10"] > 0.7


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_and_validate_as_one(runs: dict[str, Path], way: str) -> None:
    one, two = metrics(runs["one"]), metrics(runs[way])

    assert list(one) == list(two) == list(range(1, 13))
    assert max(abs(one[step] - two[step]) for step in one) <= 1e-4
    for expected, found in zip(valid_metrics(runs["one"]), valid_metrics(runs[way])):
        assert {name: found[name] for name in VALID} == pytest.approx({name: expected[name] for name in VALID})


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_weights_of_one(runs: dict[str, Path], way: str, bert_folder: Path) -> None:
    before, one, two = (load_model(path).state_dict() for path in (bert_folder, runs["one"], runs[way]))

    assert before.keys() == one.keys() == two.keys()
    for name, value in one.items():
        # The gradient of a key's bias is zero, as softmax does not see it; Adam makes steps of what rounding leaves.
        assert float((value - two[name]).abs().max()) <= (1e-2 if name.endswith("k_proj.bias") else 1e-4), name
    assert not torch.equal(one["frontend.embed.weight"], before["frontend.embed.weight"])


def test_first_validation_is_that_of_the_model_before(runs: dict[str, Path], bert_folder: Path, texts: Path) -> None:
    folder = runs["one"].with_name("before")
    shutil.copytree(bert_folder, folder)
    write_json(folder / HEAD_FILE, {"pooling": "none"})
    task = task_from_examples(list(ExampleDataset([texts])))
    expected = evaluate_embedder(Embedder.load(folder, device="cpu"), task)

    for way in runs.values():
        first = valid_metrics(way)[0]
        assert {name: first[name] for name in VALID} == pytest.approx({name: expected[name.lower()] for name in VALID})


def test_evaluation_of_the_run_is_its_last_validation(runs: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    run("evaluate", runs["ddp"], texts, "--output", tmp_path / "results.json").expect(0)

    results = json.loads(tmp_path.joinpath("results.json").read_text())["metrics"]
    last = valid_metrics(runs["ddp"])[-1]
    assert {name: results[name.lower()] for name in VALID} == pytest.approx({name: last[name] for name in VALID})


def test_run_and_export_give_vectors_of_tokens(runs: dict[str, Path], tmp_path: Path) -> None:
    run("export", runs["one"], tmp_path / "hf", "--format", "hf").expect(0)

    trained, exported = Embedder.load(runs["one"]), Embedder.load(tmp_path / "hf")
    inputs = ["red green blue", "old"]
    vectors = trained.encode(inputs)
    assert [v.shape for v in vectors] == [(5, 32), (3, 32)]
    for found, expected in zip(exported.encode(inputs), vectors):
        np.testing.assert_array_equal(found, expected)


def test_layers_that_the_checkpoint_does_not_have_are_an_error(bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    result = run(
        "train", tmp_path / "run", "--no-rich", "--config", f"model.path={bert_folder}", f"dataset.paths=[{texts}]",
        "model.config_overrides.head={pooling: none, dense: [{input_dim: 32, output_dim: 8}]}",
        "loss.config.similarity=maxsim", "dataset.batch_size=8", "regime.num_steps=1",
    )  # fmt: skip

    assert result.status == 2
    assert "head.dense.0.weight" in result.output

"""A global batch is trained on alike, however many processes share it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from tests.integration.command_line import metrics, run, weights
from vembed_fs2 import Embedder, load_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path, clip_folder: Path) -> dict[str, Path]:
    """20 steps of 32 rows on one process, on two by DDP, and on two by FSDP2."""
    folder = tmp_path_factory.mktemp("runs")
    ways = {
        "one": (32, 1, "ddp"),
        "ddp": (16, 2, "ddp"),
        "fsdp": (16, 2, "fsdp"),
    }
    for name, (batch_size, num_processes, parallelism) in ways.items():
        run(
            "train", folder / name, "--no-rich", "--config", f"trainer.data_parallelism={parallelism}",
            f"model.path={clip_folder}", f"dataset.paths=[{digits}/train.jsonl]", f"dataset.batch_size={batch_size}",
            "regime.num_steps=20", "regime.publish_metrics_every_n_steps=1", "optimizer.config.lr=0.001",
            "loss.config.learn_temperature=true", "trainer.mixed_precision.mode=off",
            num_processes=num_processes,
        ).expect(0)  # fmt: skip
    return {name: folder / name for name in ways}


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(runs: dict[str, Path], way: str) -> None:
    one, two = metrics(runs["one"]), metrics(runs[way])

    assert list(one) == list(two) == list(range(1, 21))
    assert max(abs(one[step] - two[step]) for step in one) <= 1e-4
    for name in ("Accuracy", "Negatives per Query", "Temperature", "Total Number of Queries", "Gradient Norm"):
        assert metrics(runs[way], name)[20] == pytest.approx(metrics(runs["one"], name)[20], rel=1e-3), name


@pytest.mark.parametrize("way", ["one", "ddp", "fsdp"])
def test_rates_count_the_whole_batch(runs: dict[str, Path], way: str) -> None:
    queries, tokens, seconds = (
        metrics(runs[way], name) for name in ("Queries per Second", "Tokens per Second", "Lapse Time")
    )
    of_one = metrics(runs["one"], "Queries per Second"), metrics(runs["one"], "Tokens per Second")

    assert median(queries[step] * seconds[step] for step in queries) == pytest.approx(32, rel=0.1)
    per_query = {step: tokens[step] / queries[step] for step in queries}
    assert per_query == pytest.approx({step: of_one[1][step] / of_one[0][step] for step in per_query}, rel=1e-6)
    assert min(per_query.values()) > 2 * 2 + 1  # The patches of an image, its class token, and a caption.


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_have_the_weights_of_one(runs: dict[str, Path], way: str, clip_folder: Path) -> None:
    before, one, two = (load_model(path).state_dict() for path in (clip_folder, runs["one"], runs[way]))

    assert before.keys() == one.keys() == two.keys()
    for name, value in one.items():
        # The gradient of a key's bias is zero, as softmax does not see it; Adam makes steps of what rounding leaves.
        is_noise = name.endswith("k_proj.bias")
        assert float((value - two[name]).abs().max()) <= (1e-3 if is_noise else 1e-5), name
        assert is_noise or float((value - before[name]).abs().max()) > 1e-3, f"{name} has not moved"


def test_the_checkpoint_holds_what_is_loaded(runs: dict[str, Path]) -> None:
    loaded = load_model(runs["one"]).state_dict()

    assert all(torch.equal(loaded[name], value) for name, value in weights(runs["one"]).items())


def test_a_sharded_run_embeds_as_the_others(runs: dict[str, Path], digits: Path) -> None:
    row = json.loads(digits.joinpath("train.jsonl").read_text().splitlines()[0])
    inputs = [row["query"], digits / row["positive_image"]]
    expected = Embedder.load(runs["one"]).encode(inputs)

    np.testing.assert_allclose(Embedder.load(runs["ddp"]).encode(inputs), expected, atol=1e-4)
    np.testing.assert_allclose(Embedder.load(runs["fsdp"]).encode(inputs), expected, atol=1e-4)

"""The train recipe with an objective that learns something of its own: that of the guide, which no package has."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.forks import Result, free_port, gang_environment, run_forks
from tests.integration.command_line import assert_same_weights, be_fairseq2, environment, metrics, run, weights
from tests.integration.test_train_losses import arguments, guide_blocks
from vembed_fs2 import Embedder

NAME = "dimension_weights"

LOSS = {"name": "weighted", "config": {"temperature": 0.2}}


def be_fairseq2_with_weighted(site: Path, command: list[str]) -> None:
    sys.path.insert(0, str(site))
    importlib.import_module("weighted").setup_weighted(None)
    be_fairseq2(["vembed", *command])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the guide's objective as a module."""
    tmp_path.joinpath("weighted.py").write_text(next(b for b in guide_blocks("python") if "setup_weighted" in b))
    return tmp_path


def train(site: Path, command: list[str], num_processes: int = 1) -> Result:
    port = free_port()
    ranks = [gang_environment(rank, num_processes, port) if num_processes > 1 else {} for rank in range(num_processes)]
    return run_forks(be_fairseq2_with_weighted, site, command, environments=[environment(**rank) for rank in ranks])


def learned(folder: Path) -> Tensor:
    return Embedder.load(folder).model.get_parameter(NAME).detach()


def test_it_is_trained_resumed_trained_on_and_not_exported(
    site: Path, tmp_path: Path, bert_folder: Path, texts: Path
) -> None:
    whole, stopped, second, third = (tmp_path / name for name in ("whole", "stopped", "second", "third"))
    steps = {folder: ["regime.checkpoint_every_n_steps=2", "regime.num_steps=4"] for folder in (whole, second, third)}
    nested = {"name": "matryoshka", "config": {"dims": [8, 32], "loss": LOSS}}

    train(site, arguments(whole, bert_folder, texts, nested, *steps[whole])).expect(0)
    train(site, arguments(stopped, bert_folder, texts, nested, *steps[whole], "regime.num_steps=2")).expect(0)
    train(site, arguments(stopped, bert_folder, texts, nested, *steps[whole])).expect(0)

    assert metrics(stopped, "Loss") == metrics(whole, "Loss")
    assert_same_weights(whole, stopped)
    assert weights(whole)[NAME].shape == (32,)
    assert float((weights(whole)[NAME] - 1.0).abs().max()) > 1e-3  # Trained.

    # It goes on being trained where it is learned, and stays as it is where another objective is.
    run_again: list[Any] = [(second, LOSS, "optimizer.config.lr=1e-12"), (third, {"name": "infonce"}, "")]
    for folder, loss, more in run_again:
        train(site, arguments(folder, whole, texts, loss, *steps[folder], *filter(None, [more]))).expect(0)
        torch.testing.assert_close(learned(folder), learned(whole))

    out = tmp_path / "exported"
    Embedder.load(whole).save_hf(out)
    assert NAME not in Embedder.load(out).model.state_dict()


def test_two_processes_learn_and_resume_it_sharded(site: Path, tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    more = ["model.config_overrides.dropout_p=0", "model.config_overrides.attn_dropout_p=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(site, arguments(one, bert_folder, texts, LOSS, *more, "regime.num_steps=4")).expect(0)
    more += ["dataset.batch_size=4", "trainer.data_parallelism=fsdp", "regime.checkpoint_every_n_steps=2"]
    for num_steps in (2, 4):
        command = arguments(two, bert_folder, texts, LOSS, *more, f"regime.num_steps={num_steps}")
        train(site, command, num_processes=2).expect(0)

    assert list(metrics(two, "Loss").values()) == pytest.approx(list(metrics(one, "Loss").values()), rel=1e-3)
    torch.testing.assert_close(learned(two), learned(one), rtol=1e-3, atol=2e-4)


def test_objectives_that_declare_it_differently_are_an_error(tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    losses = [{"name": "sigmoid", "config": {"bias": bias}} for bias in (-10.0, -5.0)]
    result = run(*arguments(tmp_path / "run", bert_folder, texts, {"name": "combined", "config": {"losses": losses}}))
    assert "`logit_bias`, but they declare it differently: `mean` -10 and -5." in result.expect(2).output

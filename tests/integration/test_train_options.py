"""The options of a run work together, and none of them breaks a resume."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.integration.command_line import interrupt, kill_group, metrics, run, steps
from vembed_fs2 import Embedder, load_model

NUM_ROWS, BROKEN = 70, 3


@pytest.fixture(scope="module")
def broken_rows(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 rows of which 3 have an image that is missing, truncated or huge."""
    folder = tmp_path_factory.mktemp("broken") / "data"
    shutil.copytree(digits, folder)
    rows = [json.loads(line) for line in folder.joinpath("train.jsonl").read_text().splitlines()[:NUM_ROWS]]
    missing, truncated, huge = (folder / rows[i]["positive_image"] for i in (10, 20, 30))
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-40])
    Image.new("1", (40_000, 40_000)).save(huge)
    folder.joinpath("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


def full_state(run_dir: Path) -> dict[str, Tensor]:
    return load_model(run_dir).state_dict()


# Resuming under DDP is also tested in test_train_resume.py.
@pytest.mark.parametrize("parallelism", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_run_with_every_option_resumes_exactly(
    parallelism: str, broken_rows: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """bf16, accumulation, activation checkpoints, rows that are left out and an uneven last batch, on two ranks."""

    def arguments(folder: Path) -> list[object]:
        return [
            "train", folder, "--no-rich", "--nproc-per-node", 2, "--config",
            f"model.path={clip_folder}", f"dataset.paths=[{broken_rows}]", "dataset.batch_size=4",
            "dataset.drop_last=false", "dataset.on_error=skip", "regime.num_data_epochs=4",
            "regime.checkpoint_every_n_steps=1", "regime.publish_metrics_every_n_steps=1",
            f"trainer.data_parallelism={parallelism}", "trainer.mixed_precision.mode=static",
            "trainer.mixed_precision.dtype=bfloat16", "trainer.grad_accumulation.num_batches=2",
            "trainer.activation_checkpointing.mode=layerwise", "trainer.max_grad_norm=0.5",
            "grad_cache.chunk_tokens=64", "grad_cache.activation_budget=0", "optimizer.config.lr=0.001",
        ]  # fmt: skip

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = run(*arguments(whole), num_processes=2).expect(0)
    kill_at = random.Random(0).randint(6, 12)
    interrupt(arguments(stopped), reached(stopped, kill_at), kill_group, tmp_path / "log.txt")
    run(*arguments(stopped), num_processes=2).expect(0)

    # 69 rows in global batches of 8, two of them a step: the last step of an epoch has one batch, of 3 and 2 rows.
    assert steps(whole)[-1] == steps(stopped)[-1] == 20
    assert metrics(stopped) == metrics(whole)
    assert metrics(whole, "Total Number of Queries")[20] == 4 * (NUM_ROWS - BROKEN)
    before, after, resumed = (full_state(path) for path in (clip_folder, whole, stopped))
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    assert [name for name in before if torch.equal(after[name], before[name])] == ["logit_scale"]  # Not learned.
    # A missing image is found at the start, a broken one when it is decoded, by the rank that has the row.
    assert f"1 of 70 rows cannot be used:\n  - {broken_rows}:11: " in result.output
    logs = "".join(path.read_text() for path in whole.glob("logs/rank_*.log"))
    assert all(f"A row is left out: {broken_rows}:{line}: " in logs for line in (21, 31))


def reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(s >= step for s in metrics(folder)) and steps(folder) != []


def test_best_checkpoint_is_kept_and_loaded(digits: Path, clip_folder: Path, tmp_path: Path) -> None:
    """With TensorBoard and W&B, and secrets in the environment that nothing may show."""
    secrets = {
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "HF_TOKEN": "hf_verysecretindeed",
        "DB_PASS": "short",
        "HTTPS_PROXY": "http://someone:p@ss/word@proxy.invalid:3128",
    }
    folder = tmp_path / "run"

    start = tmp_path / "start"
    run(
        "train", start, "--no-rich", "--config", f"model.path={clip_folder}",
        f"dataset.paths=[{digits}/train.jsonl]", "dataset.batch_size=32", "regime.num_steps=150",
        "optimizer.config.lr=0.003",
    ).expect(0)  # fmt: skip
    # A learning rate that rises until it ruins the model: the best checkpoint is an early one.
    result = run(
        "train", folder, "--no-rich", "--config", f"model.path={start}", "lr_scheduler.config.warmup_steps=8",
        f"dataset.paths=[{digits}/train.jsonl]", f"valid.paths=[{digits}/held_out.jsonl]", "valid.max_rows=100",
        "dataset.batch_size=32", "regime.num_steps=8", "regime.publish_metrics_every_n_steps=2",
        "regime.validate_every_n_steps=2", "regime.checkpoint_every_n_steps=2", "regime.score_metric=mrr",
        "regime.keep_best_n_checkpoints=1", "regime.keep_last_n_checkpoints=1", "regime.validate_at_start=true",
        "optimizer.config.lr=1.0", "common.metric_recorders.wandb.enabled=true",
        "common.metric_recorders.wandb.project=test", WANDB_MODE="offline", **secrets,
    ).expect(0)  # fmt: skip

    scores = {int(f.stem[5:]): float(f.read_text()) for f in folder.glob("checkpoints/scores/step_*.txt")}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert best in steps(folder)
    assert steps(folder)[-1] == 8
    inputs = ["a handwritten three", "the number 5"]
    loaded = Embedder.load(folder).encode(inputs)
    np.testing.assert_array_equal(loaded, Embedder.load(folder / "checkpoints" / f"step_{best}").encode(inputs))
    assert not np.array_equal(loaded, Embedder.load(folder / "checkpoints" / "step_8").encode(inputs))

    assert list(folder.glob("tb/train/events.out.tfevents.*"))
    assert list(folder.glob("**/offline-run-*/*.wandb"))
    shown = result.output + "".join(f.read_text() for f in folder.rglob("logs/**/*") if f.is_file())
    assert not [name for name in ("WANDB_API_KEY", "HF_TOKEN") if secrets[name] in shown]
    assert "DB_PASS=[redacted]" in shown
    assert "HTTPS_PROXY=http://[redacted]@proxy.invalid:3128" in shown
    assert "ss/word" not in shown

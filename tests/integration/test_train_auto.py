"""A wrapped model is trained from its folder like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.integration.command_line import metrics, run, run_block
from tests.integration.test_docs import blocks


@pytest.fixture(scope="module")
def electra(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ELECTRA with dropout, with the tokenizer of ``bert_folder``."""
    from transformers import ElectraConfig, ElectraModel

    folder = Path(shutil.copytree(bert_folder, tmp_path_factory.mktemp("electra") / "model"))
    config = ElectraConfig(
        vocab_size=18,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ElectraModel(config).save_pretrained(folder)
    return folder


def test_a_folder_is_trained_and_exported(electra: Path, texts: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    from vembed_fs2 import Embedder

    out = tmp_path / "run"
    common = [f"model.path={electra}", f"dataset.paths=[{texts}]", "dataset.batch_size=16", "regime.num_steps=8",
              "regime.publish_metrics_every_n_steps=1", "optimizer.config.lr=0.01"]  # fmt: skip
    more = ["loss.config.learn_temperature=true", "trainer.activation_checkpointing.mode=layerwise",
            "model.config_overrides.head.pooling=cls"]  # fmt: skip
    run("train", out, "--no-rich", "--config", *common, *more).expect(0)
    assert "ElectraModel is wrapped" in out.joinpath("logs", "rank_0.log").read_text()
    loss = metrics(out)
    assert loss[8] < loss[1]
    embedder = Embedder.load(out, device="cpu")
    assert embedder.source.family == "vembed_auto"
    assert embedder.source.config.head.pooling == "cls"
    run("export", out, tmp_path / "hf", "--format", "hf").expect(0)
    again = Embedder.load(tmp_path / "hf", device="cpu")
    assert np.array_equal(again.encode(["red blue", "old"]), embedder.encode(["red blue", "old"]))
    _, info = AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values())


def test_commands_of_the_guide_run(electra: Path, texts: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("electra").symlink_to(electra)
    shutil.copy(texts, tmp_path / "train.jsonl")
    for command in blocks("docs/auto.md", "bash"):
        run_block(command, tmp_path)
    assert tmp_path.joinpath("runs", "electra", "checkpoints").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("data_parallelism", ["ddp", "fsdp"])
def test_two_processes(electra: Path, texts: Path, tmp_path: Path, data_parallelism: str) -> None:
    from vembed_fs2 import Embedder

    out = tmp_path / "run"
    run("train", out, "--no-rich", "--config", f"model.path={electra}",
        f"dataset.paths=[{texts}]", "dataset.batch_size=8", "regime.num_steps=4",
        "regime.publish_metrics_every_n_steps=1", f"trainer.data_parallelism={data_parallelism}",
        "grad_cache.chunk_tokens=64", num_processes=2).expect(0)  # fmt: skip
    assert sorted(metrics(out)) == [1, 2, 3, 4]
    assert np.isfinite(Embedder.load(out, device="cpu").encode("red blue")).all()


def test_tensor_parallelism_is_refused_before_anything_is_written(electra: Path, texts: Path, tmp_path: Path) -> None:
    result = run("train", tmp_path / "run", "--config", f"model.path={electra}", f"dataset.paths=[{texts}]",
                 "dataset.batch_size=8", "gang.tensor_parallel_size=2", num_processes=2)  # fmt: skip
    assert result.status != 0
    assert "tensor parallelism" in result.output

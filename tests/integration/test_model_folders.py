"""Model folders and repositories, from one end to the other: trained, resumed, evaluated and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.integration.command_line import run, run_all, steps
from vembed_fs2 import Embedder

FIELDS = {
    "bos_token_id": 3, "eos_token_id": 4, "id2label": {"0": "cat", "1": "dog"}, "problem_type": "regression",
    "of_a_later_version": {"deep": [1, None]},
}  # fmt: skip

COMMIT = "1" * 40

SNAPSHOT = f"models--some-one--tiny/snapshots/{COMMIT}"


@pytest.fixture(scope="module")
def settings(texts: Path) -> list[str]:
    return [
        f"dataset.paths=[{texts}]", "dataset.batch_size=8", "regime.checkpoint_every_n_steps=1",
        "regime.publish_metrics_every_n_steps=1",
        "optimizer.config.lr=0.001", "trainer.mixed_precision.mode=off",
    ]  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, bert_folder: Path) -> Path:
    """The hub's cache with the repository ``some-one/tiny``."""
    cache = tmp_path / "hub"
    shutil.copytree(bert_folder, cache / SNAPSHOT)
    refs = cache / "models--some-one--tiny" / "refs"
    refs.mkdir()
    refs.joinpath("main").write_text(COMMIT)
    file = cache / SNAPSHOT / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | FIELDS))
    return cache


def test_a_tokenizer_that_does_not_fit_is_an_error_before_anything_is_written(
    bert_folder: Path, clip_folder: Path, settings: list[str], digits: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bert_folder, tmp_path / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["newtok"])
    tokenizer.save_pretrained(folder)

    base = "model.config_overrides"
    distil = ["loss.name=embedding_distillation", f"teacher.path={folder}"]
    images = [f"dataset.paths=[{digits}/train.jsonl]", f"dataset.image_root={digits}", *settings[1:]]
    configs = [
        [f"model.path={folder}", *settings],
        [f"model.path={bert_folder}", f"processor.path={folder}", *settings],
        [f"model.path={bert_folder}", *distil, *settings],
        ["model.family=vembed_composed", f"{base}.text.path={folder}", f"{base}.image.path={clip_folder}", *images],
    ]
    commands = [["train", str(tmp_path / "run"), "--no-rich", "--config", *config] for config in configs]
    message = f"{folder}: the tokenizer needs an embedding table of {rows + 1} rows (for 'newtok'), but the model's has"
    for result in run_all([*commands, ["evaluate", str(folder), str(digits / "held_out.jsonl")]]):
        assert f"error: {message} {rows}." in result.expect(2).output
    assert not tmp_path.joinpath("run").exists()


def test_a_repository_of_the_hub_works_wherever_a_model_is_named(
    hub: Path, bert_folder: Path, texts: Path, settings: list[str], tmp_path: Path
) -> None:
    """And the fields of its ``config.json`` travel with a run, with the run that starts from it, and are exported."""
    name, env = "some-one/tiny", {"HF_HUB_CACHE": str(hub)}
    distil = ["loss.name=embedding_distillation", f"teacher.name={name}"]
    command = ["train", tmp_path / "one", "--no-rich", "--config", f"model.path={name}", *settings, *distil]
    run(*command, "regime.num_steps=1", **env).expect(0)
    run(*command, "regime.num_steps=2", **env).expect(0)
    assert steps(tmp_path / "one") == [1, 2]

    content = json.loads(hub.joinpath(SNAPSHOT, "config.json").read_text())
    output = run("evaluate", name, texts, "--baseline", bert_folder, "--output", tmp_path / "r.json", **env).output
    assert name in output
    results = json.loads(tmp_path.joinpath("r.json").read_text())
    assert results["metrics"] == results["baseline_metrics"]

    shutil.rmtree(hub)
    command = ["train", tmp_path / "two", "--no-rich", "--config", f"model.path={tmp_path / 'one'}", *settings]
    run(*command, "regime.num_steps=1", "model.config_overrides.dropout_p=0.25").expect(0)
    for layout in ("hf", "sentence-transformers"):
        Embedder.load(tmp_path / "two", device="cpu").save(tmp_path / layout, layout)
        written = json.loads(tmp_path.joinpath(layout, "config.json").read_text())
        expected = content | {"hidden_dropout_prob": 0.25}
        for field in ("architectures", "dtype", "transformers_version"):
            expected.pop(field, None)
        assert {k: written.get(k) for k in expected} == expected


def test_an_encoder_only_t5_trains_and_is_exported(bert_folder: Path, settings: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "t5"
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=18, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    for file in bert_folder.glob("*token*"):
        shutil.copy(file, folder)

    run(
        "train", tmp_path / "run", "--no-rich", "--config", f"model.path={folder}", *settings, "regime.num_steps=1"
    ).expect(0)
    embedder = Embedder.load(tmp_path / "run", device="cpu")
    embedder.save_sentence_transformers(tmp_path / "out")
    found, before = (Embedder.load(f, device="cpu").encode(["red green"]) for f in (tmp_path / "out", folder))
    assert np.array_equal(found, embedder.encode(["red green"]))
    assert not np.array_equal(found, before)
    model = transformers.T5EncoderModel.from_pretrained(tmp_path / "out")
    assert torch.equal(model.shared.weight, embedder.model.get_parameter("wrapped.shared.weight"))


def test_composed_models_take_encoders_from_the_hub(
    hub: Path, bert_folder: Path, clip_folder: Path, digits: Path, tmp_path: Path
) -> None:
    base = "model.config_overrides"
    run(
        "train", tmp_path / "run", "--no-rich", "--config", "model.family=vembed_composed",
        f"{base}.text.path=some-one/tiny", f"{base}.text.freeze=all", f"{base}.image.path={clip_folder}",
        f"dataset.paths=[{digits}/train.jsonl]", f"dataset.image_root={digits}", "dataset.batch_size=8",
        "regime.num_steps=1", HF_HUB_CACHE=str(hub),
    ).expect(0)  # fmt: skip
    model = Embedder.load(tmp_path / "run", device="cpu").model.get_submodule("text.backbone")
    own = Embedder.load(bert_folder, device="cpu").model
    assert torch.equal(model.get_parameter("frontend.embed.weight"), own.get_parameter("frontend.embed.weight"))


def test_a_name_of_the_hub_without_a_connection_is_one_sentence(settings: list[str], tmp_path: Path) -> None:
    for name in ("nobody/nothing", "bge-small-en-v1.5"):
        arguments = ["train", tmp_path / "run", "--no-rich", "--config", f"model.path={name}", *settings]
        output = run(*arguments, HF_HUB_CACHE=str(tmp_path)).expect(2).output
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert error.count("there is no connection to the hub") == 1
        assert error.endswith("connect to the internet, or give a folder with a copy of the repository.")
        assert not tmp_path.joinpath("run").exists()

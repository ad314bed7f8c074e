"""Composed models: trained, locked, on several processes, saved whole, and trained on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.integration.command_line import run, run_all, run_block
from vembed_fs2 import Embedder, load_model
from vembed_fs2.cli import VEMBED
from vembed_fs2.commands import demo
from vembed_fs2.hub.find import find_model
from vembed_fs2.models.composed import ComposedConfig

GUIDE = Path(__file__).parents[2] / "docs/composed.md"

BASE = "model.config_overrides"


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path, clip_folder: Path, digits: Path) -> Path:
    """The folder in which the commands of the guide ran; what they start from is gone."""
    folder = tmp_path_factory.mktemp("guide")
    for name, source in (("bert", bert_folder), ("clip", clip_folder), ("digits", digits)):
        shutil.copytree(source, folder / name)
    commands = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(commands) == 4
    for command in commands:
        run_block(command, folder)
    for name in ("bert", "clip"):
        shutil.rmtree(folder / name)
    return folder


def state_of(model: Path) -> dict[str, Tensor]:
    return load_model(model).state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str = "") -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys() if name.startswith(prefix))


def optimizer_sizes(run_dir: Path) -> list[int]:
    """The number of elements of each parameter that the optimizer has a state of."""
    (file,) = run_dir.glob("checkpoints/step_*/**/optimizer/**/*.pt")
    state = torch.load(file, weights_only=False)["state"]
    return sorted(entry["exp_avg"].numel() for entry in state.values())


def test_locked_encoder_stays_as_it_is(guide: Path, clip_folder: Path, bert_folder: Path) -> None:
    run_dir = guide / "runs/lit"
    config = find_model(run_dir).config
    assert isinstance(config, ComposedConfig)
    assert (config.text.freeze, config.image.freeze) == ("none", "all")
    state, image, text = state_of(run_dir), state_of(clip_folder), state_of(bert_folder)
    assert not any(name.startswith("image.backbone.text") for name in state)
    found = {n.removeprefix("image.backbone."): t for n, t in state.items() if n.startswith("image.backbone.vision.")}
    assert found.keys() == {name for name in image if name.startswith("vision.")}
    assert equal(found, image)
    found = {n.removeprefix("text.backbone."): t for n, t in state.items() if n.startswith("text.backbone.encoder.")}
    assert found
    assert not any(torch.equal(tensor, text[name]) for name, tensor in found.items() if name.endswith("weight"))

    # The optimizer knows the text tower and both projections only.
    model = load_model(run_dir)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad and "pooler" not in n}
    assert not any(name.startswith("image.backbone.") for name in trained)
    assert optimizer_sizes(run_dir) == sorted(trained.values())


def test_run_and_export_need_nothing_else(guide: Path) -> None:
    # The folders that the encoders came from were deleted.
    image = guide / "digits/images/0000-0.png"
    inputs: list[Any] = ["red small", "a round heavy blue", image, {"text": "new", "image": str(image)}]
    expected = Embedder.load(guide / "runs/lit").encode(inputs)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(Embedder.load(guide / "lit-model").encode(inputs), expected)
    config = find_model(guide / "lit-model").config
    assert config.text.source is config.image.source is None
    assert config.image.freeze == "all"


def test_exported_model_is_trained_on_as_a_whole(guide: Path) -> None:
    before, after = state_of(guide / "lit-model"), state_of(guide / "runs/more")
    for prefix in ("text.backbone.encoder.", "text.projection", "image.backbone.vision.", "image.projection."):
        assert not equal(before, after, prefix)
    assert find_model(guide / "runs/more").config.image.freeze == "none"


def test_groups_have_learning_rates_of_their_own(guide: Path, clip_folder: Path, bert_folder: Path) -> None:
    state, text, image = state_of(guide / "runs/groups"), state_of(bert_folder), state_of(clip_folder)
    changes = {"text": 0.0, "image": 0.0}
    for modality, start in (("text", text), ("image", image)):
        for name, tensor in start.items():
            if name.endswith("proj.weight") and (found := state.get(f"{modality}.backbone.{name}")) is not None:
                changes[modality] = max(changes[modality], float((found - tensor).abs().max()))
    # Adam's steps are as long as the learning rate: 2e-5 and 1e-6, twice at most.
    assert 1e-5 < changes["text"] < 5e-5
    assert 5e-7 < changes["image"] < 2.5e-6


@pytest.mark.slow  # Two processes compute the right gradients in tests/distributed/test_families.py.
def test_processes_train_the_same_model(bert_folder: Path, clip_folder: Path, digits: Path, tmp_path: Path) -> None:
    """A frozen encoder, and one that is frozen but for its last layer, on one process, DDP and FSDP2."""
    ways = {
        "one": (8, 1, "ddp"),
        "ddp": (4, 2, "ddp"),
        "fsdp": (4, 2, "fsdp"),
    }
    states = {}
    for name, (batch_size, num_processes, parallelism) in ways.items():
        run(
            "train", tmp_path / name, "--no-rich", "--config", f"trainer.data_parallelism={parallelism}",
            "model.family=vembed_composed",
            f"{BASE}.text.path={bert_folder}", f"{BASE}.image.path={clip_folder}", f"{BASE}.image.freeze=all",
            f"{BASE}.text.freeze=all_but_last", f"{BASE}.text.trained_layers=1", f"{BASE}.embedding_dim=16",
            f"{BASE}.text.config.dropout_p=0", f"{BASE}.text.config.attn_dropout_p=0",
            f"{BASE}.image.projection.kind=mlp", "loss.config.learn_temperature=true",
            f"dataset.paths=[{digits}/train.jsonl]", f"dataset.batch_size={batch_size}", "regime.num_steps=2",
            "grad_cache.chunk_tokens=32", "grad_cache.activation_budget=0", "optimizer.config.lr=0.001",
            r"optimizer.config.groups=[{params: text\.backbone\.encoder\.layers\.1\.ffn, lr: 0.0003}]",
            "trainer.activation_checkpointing.mode=layerwise", "trainer.mixed_precision.mode=off",
            num_processes=num_processes,
        ).expect(0)  # fmt: skip
        states[name] = state_of(tmp_path / name)
    before = state_of(bert_folder)
    for name, tensor in states["one"].items():
        for other in ("ddp", "fsdp"):
            # The projections start from random weights, which the first rank draws.
            torch.testing.assert_close(states[other][name], tensor, rtol=0, atol=2e-5, msg=f"{other}: {name}")
    ffn = "encoder.layers.1.ffn.inner_proj.weight"
    for state in states.values():  # Two steps of Adam, each as long as the learning rate at most.
        change = (state[f"text.backbone.{ffn}"] - before[ffn]).abs().max()
        assert 1e-4 < change < 7e-4
    frozen = [n for n in before if n.startswith(("frontend.", "encoder.layers.0."))]
    assert frozen
    assert all(torch.equal(states["fsdp"][f"text.backbone.{name}"], before[name]) for name in frozen)
    assert states["one"]["logit_scale"].item() != pytest.approx(np.log(1 / 0.05), abs=1e-6)


def test_mistakes_are_said_before_anything_is_written(bert_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "red", "positive": "green"}\n' * 4)
    text, image = f"{BASE}.text.path={bert_folder}", f"{BASE}.image.path={clip_folder}"
    cases: list[tuple[list[str], list[str]]] = [
        ([], ["`text`: `path` (a folder), `name` (a card) or `family`", "`image`: `path` (a folder)"]),
        ([f"{BASE}.text.path=/no/such", f"{BASE}.image.name=klip"], ["`text`: /no/such", "`image`: klip is neither"]),
        (
            [text, image, f"{BASE}.text.config.num_layer=1", f"{BASE}.image.freezze=all", f"{BASE}.embeding_dim=3"],
            [
                f"`{BASE}.text.config.num_layer` is not a known key. Did you mean `{BASE}.text.config.num_layers`?",
                f"`{BASE}.image.freezze` is not a known key. Did you mean `{BASE}.image.freeze`?",
                f"`{BASE}.embeding_dim` is not a known key. Did you mean `{BASE}.embedding_dim`?",
            ],
        ),
        (
            [text, image, f"{BASE}.text.config.dropout_p=2", f"{BASE}.image.projection.dropout_p=2"],
            ["`text.config`: `dropout_p` must be between 0 and 1", "`image.projection`: `dropout_p` must be in [0, 1)"],
        ),
        (
            [text, image, f"{BASE}.text.freeze=all_but_last", f"{BASE}.text.trained_layers=9"],
            ["`text`: `trained_layers` must be at most 2, but is 9 instead."],
        ),
        (
            [text, image, *(f"{BASE}.{m}.freeze=all" for m in ("text", "image")), f"{BASE}.text.projection.kind=none",
             f"{BASE}.image.projection.kind=none", f"{BASE}.embedding_dim=32"],
            ["all parameters are frozen: nothing is left to train"],
        ),
        ([text, f"{BASE}.image.family=vembed_clip", f"{BASE}.image.arch=tiny"], ["`processor.path` must name"]),
        ([text, image, "optimizer.config.groups=[{params: '(', lr: 1}]"], ["'(' is not a valid regular expression"]),
    ]  # fmt: skip
    commands = [
        ["train", str(tmp_path / f"run{i}"), "--no-rich", "--config", "model.family=vembed_composed",
         f"dataset.paths=[{rows}]", *config]
        for i, (config, _) in enumerate(cases)
    ]  # fmt: skip
    for result, (config, expected), command in zip(run_all(commands), cases, commands):
        result.expect(2)
        for text in expected:
            assert text in result.output, (config, result.output)
        assert not Path(command[1]).exists()


def test_group_of_a_frozen_encoder_is_refused(
    bert_folder: Path, clip_folder: Path, digits: Path, tmp_path: Path
) -> None:
    result = run(
        "train", tmp_path / "run", "--no-rich", "--config", "model.family=vembed_composed",
        f"{BASE}.text.path={bert_folder}", f"{BASE}.image.path={clip_folder}", f"{BASE}.image.freeze=all",
        f"dataset.paths=[{digits}/train.jsonl]", "optimizer.config.groups=[{params: image.backbone, lr: 1e-6}]",
    ).expect(2)  # fmt: skip
    assert "`groups[0].params` 'image.backbone' matches no parameter that is trained" in result.output


def train_a_little(output_dir: Path, preset: str, *, model: Path, data: Path) -> int:
    return run(
        "train", output_dir, "--no-rich", "--preset", preset, "--config", f"model.path={model}",
        f"dataset.paths=[{data}]", "regime.num_steps=4", "regime.publish_metrics_every_n_steps=4",
        "dataset.batch_size=16", "grad_cache.chunk_tokens=64", "grad_cache.activation_budget=0",
    ).status  # fmt: skip


def test_bert_and_dinov2_tell_the_story_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "train", train_a_little)
    out = tmp_path / "out"
    assert VEMBED.main(["demo", "images", str(out), "--model", "composed"], "vembed") == 0
    assert f'Embedder.load("{out}/model")' in capsys.readouterr().out
    before, after = state_of(out / "untrained"), state_of(out / "run")
    assert not any(torch.equal(after[n], before[n]) for n in before if n.endswith(("proj.weight", "class_embed")))
    check_export(out)


@pytest.mark.slow
def test_bert_and_dinov2_learn_the_digits(tmp_path: Path) -> None:
    """From random weights, with the gradient cache; its export gives the same vectors."""
    out = tmp_path / "out"
    assert VEMBED.main(["demo", "images", str(out), "--model", "composed"], "vembed") == 0
    metrics = json.loads(out.joinpath("results.json").read_text())["metrics"]
    assert metrics["after"]["i2i_recall@1"] >= 0.9
    assert metrics["after"]["zero_shot_accuracy"] >= 0.9
    check_export(out)


def check_export(out: Path) -> None:
    inputs = ["a handwritten three", "the number 5", out / "data/images/0000-0.png"]
    np.testing.assert_array_equal(
        Embedder.load(out / "model").encode(inputs), Embedder.load(out / "run").encode(inputs)
    )

"""What a model holds besides its encoder, because its objective learns it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from torch import Tensor

from tests.distributed.steps import BERT, CLIP, texts
from vembed_fs2.embedding.learned import LearnedPart, teacher_projection
from vembed_fs2.embedding.model import EmbeddingModel, EmbeddingModelConfig
from vembed_fs2.losses import LossInput, LossOutput, Objective
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.models.family import PlainCheckpointFormat, get_checkpoint_format
from vembed_fs2.resolver import get_resolver


def initial_projection(teacher_dim: int, embedding_dim: int) -> Tensor:
    return teacher_projection(teacher_dim, embedding_dim).initial()


LEARNED: Any = {"logit_scale_init": 2.0, "logit_bias_init": -10.0, "teacher_dim": 20}
FAMILIES = {"vembed_bert": BERT, "vembed_clip": CLIP}


def family(name: str) -> ModelFamily:
    get_resolver()
    return get_resolver().resolve(ModelFamily, key=name)


def create(name: str, **changes: Any) -> EmbeddingModel:
    gangs = create_fake_gangs(torch.device("cpu"))
    model = family(name).create_new_model(replace(FAMILIES[name], **changes), gangs, torch.float32, False, True)
    assert isinstance(model, EmbeddingModel)
    return model


def write_checkpoint(folder: Path, *shards: dict[str, Tensor]) -> Path:
    """As a run writes it: a file of each rank."""
    part = folder / "pp_00" / "tp_00"
    part.mkdir(parents=True)
    for rank, shard in enumerate(shards):
        torch.save(shard, part / f"sdp_{rank:02}.pt")
    return folder


def load(name: str, folder: Path, **changes: Any) -> EmbeddingModel:
    config, gangs = replace(FAMILIES[name], **changes), create_fake_gangs(torch.device("cpu"))
    model = family(name).load_custom_model(folder, config, gangs, torch.float32, False, False, None)
    assert isinstance(model, EmbeddingModel)
    return model


def learned_of(model: EmbeddingModel) -> dict[str, Tensor]:
    return {name: getattr(model, name).detach() for name in model.learned}


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_parameters_and_outputs_of_the_model(name: str) -> None:
    model = create(name, **LEARNED)
    dim = model.embedding_dim
    assert {"logit_scale", "logit_bias", "teacher_projection"} <= dict(model.named_parameters()).keys()
    output = model(texts(3, 0))
    torch.testing.assert_close(output.logit_scale, torch.tensor([2.0]))
    torch.testing.assert_close(output.logit_bias, torch.tensor([-10.0]))
    projection = output.parts["teacher_projection"]
    torch.testing.assert_close(projection, initial_projection(20, dim))
    # Copies: FSDP2 frees the parameters after the forward pass.
    assert projection.data_ptr() != model.get_parameter("teacher_projection").data_ptr()
    projection.sum().backward()
    assert model.get_parameter("teacher_projection").grad is not None


def test_the_projection_keeps_lengths() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    projected = x @ initial_projection(96, 64).T
    torch.testing.assert_close(projected.norm(dim=1).mean(), x.norm(dim=1).mean(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_checkpoint_does_not_have_yet_is_added(name: str, tmp_path: Path) -> None:
    state = create(name, teacher_dim=None).state_dict()
    model = load(name, write_checkpoint(tmp_path, state), **LEARNED)
    expected = {"logit_bias": torch.tensor([-10.0]), "teacher_projection": initial_projection(20, model.embedding_dim)}
    for key, value in expected.items():
        torch.testing.assert_close(learned_of(model)[key], value)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_checkpoint_has_is_kept_but_for_another_teacher(name: str, tmp_path: Path) -> None:
    trained = create(name, **LEARNED)
    with torch.no_grad():
        for key in trained.learned:
            trained.get_parameter(key).add_(0.5)
    checkpoint = write_checkpoint(tmp_path, trained.state_dict())
    torch.testing.assert_close(learned_of(load(name, checkpoint, **LEARNED)), learned_of(trained))
    other = learned_of(load(name, checkpoint, **{**LEARNED, "teacher_dim": 7}))
    torch.testing.assert_close(other["teacher_projection"], initial_projection(7, trained.embedding_dim))
    torch.testing.assert_close(other["logit_bias"], trained.logit_bias.detach())  # type: ignore[union-attr]
    assert "teacher_projection" not in learned_of(load(name, checkpoint, **{**LEARNED, "teacher_dim": None}))


def test_a_sharded_checkpoint_is_joined_before_anything_is_added(tmp_path: Path) -> None:
    """FSDP2 shards parameters along their first dimension, and leaves buffers whole."""
    model = create("vembed_clip", train_logit_scale=False, teacher_dim=20)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == {"logit_scale"}  # Not trained.
    shards: list[dict[str, Tensor]] = [{}, {}]
    for key, value in model.state_dict().items():
        parts = [value, value] if key in buffers else list(value.chunk(2))
        for shard, part in zip(shards, parts):
            shard[key] = part.clone()
    loaded = load("vembed_clip", write_checkpoint(tmp_path, *shards), **{**LEARNED, "train_logit_scale": False})
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)
    torch.testing.assert_close(learned_of(loaded)["logit_bias"], torch.tensor([-10.0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_folders_have_none_but_clips_temperature(name: str) -> None:
    checkpoint_format = get_checkpoint_format(name)
    assert checkpoint_format is not None
    plain, learned = create(name, teacher_dim=None), create(name, **LEARNED)
    exported = checkpoint_format.to_hg_state_dict(dict(learned.state_dict()), replace(FAMILIES[name], **LEARNED))
    expected = checkpoint_format.to_hg_state_dict(dict(plain.state_dict()), FAMILIES[name])
    assert exported.keys() == expected.keys()
    assert ("logit_scale" in exported) == (name == "vembed_clip")


def test_a_plain_format_keeps_temperature_and_bias_only() -> None:
    config = BertConfig(**LEARNED)
    plain = PlainCheckpointFormat("test_learned_parts", BertConfig)
    written: Any = plain.to_hg_config(config).data
    assert "teacher_dim" not in written["model_config"]
    again = plain.from_hf_config(written)
    assert isinstance(again, EmbeddingModelConfig)
    assert (again.logit_scale_init, again.logit_bias_init, again.teacher_dim) == (2.0, -10.0, None)
    state: dict[str, object] = {"logit_bias": torch.zeros(1), "teacher_projection": torch.zeros(2, 3)}
    assert plain.to_hg_state_dict(state, config).keys() == {"logit_bias"}


def test_what_a_family_freezes_stays_frozen_whatever_fairseq2_asks_for() -> None:
    model = create("vembed_bert", teacher_dim=20)
    assert model.frozen_parameters == {"pooler.weight", "pooler.bias"}  # Of no use to the pooling "mean".
    model.requires_grad_(False).requires_grad_(True)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == model.frozen_parameters


WEIGHTS = LearnedPart(name="weights", shape=(5,), mean=1.0)


def test_a_part_that_only_a_training_needs_is_in_checkpoints_and_not_in_folders(tmp_path: Path) -> None:
    model = create("vembed_bert", learned=[WEIGHTS])
    assert torch.equal(model(texts(3, 0)).parts["weights"], torch.ones(5))
    loaded = load("vembed_bert", write_checkpoint(tmp_path, model.state_dict()), learned=[WEIGHTS])
    assert torch.equal(loaded.get_parameter("weights"), torch.ones(5))

    config = BertConfig(learned=[WEIGHTS])
    plain = PlainCheckpointFormat("test_learned_weights", BertConfig)
    written: Any = plain.to_hg_config(config).data
    assert "learned" not in written["model_config"]
    assert not plain.to_hg_state_dict({"weights": torch.ones(5)}, config)


def test_only_what_the_objective_declares_is_trained_and_cut_to_its_bound() -> None:
    model = create("vembed_bert", **LEARNED)
    model.train_learned_parts([LearnedPart(name="logit_scale", max=1.5)])
    assert {name for name in model.learned if model.get_parameter(name).requires_grad} == {"logit_scale"}
    model.clamp_learned_parts()
    assert {name: float(model.get_parameter(name).detach().max()) for name in ("logit_scale", "logit_bias")} == {
        "logit_scale": 1.5, "logit_bias": -10.0,
    }  # fmt: skip


def test_a_part_must_not_have_the_name_of_a_module() -> None:
    with pytest.raises(ValueError, match="`encoder` is a part of the model"):
        create("vembed_bert").add_learned_parts([LearnedPart(name="encoder")])
    for part in ({"name": "a.b"}, {"name": "a", "shape": ()}):
        with pytest.raises(ValueError, match="learned part"):
            LearnedPart(**part)  # type: ignore[arg-type]


class OfAnOlderPlugin(Objective):
    initial_logit_bias = -3.0

    def compute(self, inputs: LossInput) -> LossOutput:
        raise NotImplementedError


def test_the_properties_of_older_objectives_are_read_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="define `learned_parts`"):
        (part,) = OfAnOlderPlugin().learned_parts(4)
    assert (part.name, part.mean) == ("logit_bias", -3.0)

"""Composed models: their configuration, what is frozen, what a tower of two is."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from fairseq2.nn.utils.module import reset_non_persistent_buffers, to_empty
from fairseq2.utils.structured import StandardValueConverter
from safetensors.torch import save_file
from torch.nn import Module
from torch.nn.functional import gelu

from tests.distributed.steps import BERT, CLIP, create_model, images, texts
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch, HeadConfig
from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.hub.catalog import embedding_families
from vembed_fs2.hub.towers import refuse_sources, resolve_towers
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.models.composed import (
    COMPOSED_FAMILY,
    ComposedCheckpointFormat,
    ComposedConfig,
    ComposedModel,
    ProjectionConfig,
    TowerConfig,
)
from vembed_fs2.models.composed.backbone import create_backbone
from vembed_fs2.models.family import config_errors
from vembed_fs2.resolver import get_resolver

CPU = torch.device("cpu")

TEXT = TowerConfig(family="vembed_bert", config=BERT)

IMAGE = TowerConfig(family="vembed_clip", config=CLIP)

CONFIG = ComposedConfig(text=TEXT, image=IMAGE, embedding_dim=10)


def create(config: object) -> ComposedModel:
    model = create_model(config)
    assert isinstance(model, ComposedModel)
    return model


def errors_of(config: ComposedConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        create(config)
    return caught.value.errors


def trained(module: Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def names(module: Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


def test_configuration_survives_being_written() -> None:
    config = replace(
        CONFIG,
        text=replace(TEXT, freeze="all_but_last", trained_layers=1, frozen_params=["head"], path=Path("/some/folder")),
        image=replace(IMAGE, projection=ProjectionConfig(kind="mlp", hidden_dim=7, dropout_p=0.25)),
        logit_scale_init=1.5,
    )
    values = StandardValueConverter().unstructure(config)
    assert StandardValueConverter().structure(values, ComposedConfig) == config


def test_architectures_are_those_of_the_families() -> None:
    tower = TowerConfig(family="vembed_bert", arch="minilm_l6")
    assert isinstance(tower.config, BertConfig)
    assert tower.config.model_dim == 384
    assert TowerConfig(family="vembed_bert").config == BertConfig()
    family = get_resolver().resolve(ModelFamily, key=COMPOSED_FAMILY)
    for arch in family.get_archs():
        config = family.maybe_get_arch_config(arch)
        assert config_errors(config) == []
        model = family.create_new_model(config, create_fake_gangs(CPU), torch.float32, meta=True, init_rank0_only=False)
        assert isinstance(model, ComposedModel)


def test_all_errors_of_both_towers_are_listed() -> None:
    config = ComposedConfig(
        text=TowerConfig(family="vembed_bert", config=replace(BERT, num_attn_heads=3, dropout_p=2.0)),
        image=TowerConfig(family="vembed_klip", name="card", path=Path("folder")),
        embedding_dim=0,
    )
    errors = "\n".join(config_errors(config))
    for part in (
        "`embedding_dim` must be positive",
        "`text.config`: `model_dim` must be a multiple of `num_attn_heads` (3)",
        "`text.config`: `dropout_p` must be between 0 and 1",
        "`image`: `name` and `path` must not be specified at the same time",
        "`image`: `family` 'vembed_klip' is not a family of embedding models. Did you mean 'vembed_clip'?",
    ):
        assert part in errors


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({}, "`path` (a folder), `name` (a card) or `family` must be specified"),
        ({"family": "vembed_bert", "arch": "nosuch"}, "`arch` 'nosuch' is not known. Known: "),
        ({"family": "vembed_bert", "config": CLIP}, "`config` must be of type `BertConfig`"),
        ({"freeze": "most"}, "`freeze` must be one of none, all, all_but_last, but is 'most'"),
        ({"freeze": "all_but_last"}, "`trained_layers` must be set"),
        ({"freeze": "all_but_last", "trained_layers": 0}, "`trained_layers` must be positive"),
        ({"trained_layers": 1}, "`trained_layers` is set, but `freeze` is 'none'"),
        ({"freeze": "all", "frozen_params": ["head"]}, "`frozen_params` is set, but `freeze` is 'all'"),
        ({"frozen_params": ["("]}, "`frozen_params`: '(' is not a valid regular expression"),
    ],
)
def test_tower_that_makes_no_sense_is_refused(values: dict[str, Any], error: str) -> None:
    base = {} if values == {} or "family" in values else {"family": "vembed_bert"}
    assert any(error in e for e in config_errors(TowerConfig(**base, **values)))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"kind": "cubic"}, "`kind` must be one of linear, mlp, none, but is 'cubic'"),
        ({"hidden_dim": 4}, "`hidden_dim` is set, but a projection of kind 'linear' has no hidden layer"),
        ({"kind": "mlp", "hidden_dim": 0}, "`hidden_dim` must be positive"),
        ({"kind": "none", "bias": True}, "the kind 'none' is no projection"),
        ({"dropout_p": 1.0}, "`dropout_p` must be in [0, 1)"),
        ({"activation": "gelo"}, "`activation` is 'gelo', which is not supported. Did you mean 'gelu'?"),
    ],
)
def test_projection_that_makes_no_sense_is_refused(values: dict[str, Any], error: str) -> None:
    assert any(error in e for e in config_errors(ProjectionConfig(**values)))


def test_encoders_that_do_not_fit_are_refused() -> None:
    none = ProjectionConfig(kind="none")
    errors = errors_of(replace(CONFIG, text=replace(TEXT, projection=none), image=replace(IMAGE, projection=none)))
    assert errors == [
        "`text`: `embedding_dim` must be 16, the size of the encoder's own embeddings, where `projection.kind` is "
        "'none', but is 10 instead.",
        "`image`: `embedding_dim` must be 12, the size of the encoder's own embeddings, where `projection.kind` is "
        "'none', but is 10 instead.",
    ]
    errors = errors_of(replace(CONFIG, image=TEXT))
    assert errors == ["`image`: `family` must encode images, but vembed_bert models do not."]
    late = replace(BERT, head=HeadConfig(pooling="none"))
    errors = errors_of(replace(CONFIG, text=replace(TEXT, config=late)))
    assert errors == ["`text`: `config` must give one vector per text, but gives several: change its pooling."]
    errors = errors_of(
        replace(
            CONFIG,
            text=replace(TEXT, freeze="all_but_last", trained_layers=3),
            image=replace(IMAGE, frozen_params=["text", "vision.proj"]),
        )
    )
    assert errors == [
        "`text`: `trained_layers` must be at most 2, but is 3 instead.",
        "`image`: `frozen_params`: 'text' matches no parameter; the first one is 'logit_scale'.",
    ]


def test_tower_of_two_is_created_alone() -> None:
    none = ProjectionConfig(kind="none")
    whole = create_model(CLIP).eval()
    for modality, other, batch in (("text", "vision", texts(4, 0)), ("image", "text", images(4, 0))):
        backbone = create_backbone("vembed_clip", CLIP, modality)  # type: ignore[arg-type]
        assert backbone.left_out == [other]
        assert all(torch.isfinite(p).all() for p in backbone.model.parameters())
        assert names(backbone.model) == {n for n in names(whole) if not n.startswith(f"{other}.")}
        tower = replace(IMAGE, projection=none)
        model = create(replace(CONFIG, **{modality: tower}, embedding_dim=12)).eval()
        part = getattr(model, modality)
        part.backbone.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith(f"{other}.")})
        torch.testing.assert_close(model(batch).values, whole(batch).values, rtol=0, atol=0)
        assert len(part.layer_stacks()) == 1
        # The temperature of the model that it came from is kept, and not trained.
        assert "logit_scale" in names(part.backbone)
        assert "logit_scale" not in trained(part.backbone)
        assert model(batch).logit_scale is None


def test_projections_are_what_they_are_called() -> None:
    mlp = ProjectionConfig(kind="mlp", hidden_dim=7, bias=True, dropout_p=0.5)
    model = create(replace(CONFIG, text=replace(TEXT, projection=mlp))).eval()
    text, image = texts(5, 1), images(5, 1)
    x = model.text.backbone.encode_text(text)
    weights = dict(model.text.projection.named_parameters())
    x = gelu(x @ weights["inner_proj.weight"].T + weights["inner_proj.bias"])
    x = x @ weights["output_proj.weight"].T + weights["output_proj.bias"]
    torch.testing.assert_close(model(text).values, x, rtol=0, atol=1e-6)
    x = (
        model.image.backbone.encode_image(image)
        @ dict(model.image.projection.named_parameters())["output_proj.weight"].T
    )
    torch.testing.assert_close(model(image).values, x, rtol=0, atol=1e-6)
    assert not torch.equal(model.train()(text).values, model(text).values)


def test_rows_of_both_are_fused_and_the_batch_does_not_matter() -> None:
    model = create(CONFIG).eval()
    text, image = texts(3, 2), images(3, 3)
    batch = EncoderBatch(3, text.text, image.images)
    unit = [torch.nn.functional.normalize(model(x).values, dim=-1) for x in (text, image)]
    torch.testing.assert_close(model(batch).values, unit[0] + unit[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(batch.select([2])).values, model(batch).values[2:], rtol=0, atol=1e-6)


def test_locked_tower_has_no_graph_and_no_dropout() -> None:
    none = ProjectionConfig(kind="none")
    model = create(replace(CONFIG, image=replace(IMAGE, freeze="all", projection=none), embedding_dim=12))
    assert trained(model.image) == set()
    # fairseq2 asks for all gradients after it has loaded a model.
    model.requires_grad_(True).train()
    assert trained(model.image) == set()
    assert not model.image.backbone.training
    assert model.text.backbone.training
    batch = images(4, 0)
    assert not model(batch).values.requires_grad
    torch.testing.assert_close(model(batch).values, model(batch).values, rtol=0, atol=0)
    assert not torch.equal(model(texts(4, 0)).values, model(texts(4, 0)).values)
    assert names(model.text) == trained(model.text) | {"backbone.logit_scale"} | UNUSED_POOLER


UNUSED_POOLER = {"backbone.pooler.weight", "backbone.pooler.bias"}


def test_last_layers_are_trained_and_what_follows_them() -> None:
    model = create(replace(CONFIG, text=replace(TEXT, freeze="all_but_last", trained_layers=1))).train()
    first, last = "backbone.encoder.layers.0.", "backbone.encoder.layers.1."
    expected = {n for n in names(model.text) if n.startswith((last, "projection."))}
    assert trained(model.text) == expected
    layers = model.text.layer_stacks()[0]
    assert [layer.training for layer in layers] == [False, True]
    assert not any(m.training for m in model.text.backbone.get_submodule("frontend").modules())
    assert any(n.startswith(first) for n in names(model.text))

    model = create(replace(CONFIG, image=replace(IMAGE, freeze="all_but_last", trained_layers=2)))
    follows = ("backbone.vision.encoder.", "backbone.vision.layer_norm.", "backbone.vision.proj.", "projection.")
    assert trained(model.image) == {n for n in names(model.image) if n.startswith(follows)}


def test_parameters_are_frozen_by_expression_also_inside_checkpointed_layers() -> None:
    tower = replace(TEXT, frozen_params=[r"encoder\.layers\.\d+\.self_attn\.", "frontend"])
    family = get_resolver().resolve(ModelFamily, key=COMPOSED_FAMILY)
    model = create(replace(CONFIG, text=tower))
    frozen = {n for n in names(model.text) if "self_attn." in n or "frontend" in n} | {"backbone.logit_scale"}
    assert names(model.text) - trained(model.text) == frozen | UNUSED_POOLER
    family.apply_layerwise_ac(model, 1)
    count = len(trained(model.text))
    model.requires_grad_(True).train()
    assert len(trained(model.text)) == count
    assert model.text.backbone.get_submodule("frontend").training is False


def test_loaded_model_starts_anew_for_another_encoder() -> None:
    base = ComposedConfig(text=TowerConfig(family="vembed_bert", arch="tiny"), image=IMAGE, embedding_dim=10)
    values = resolve_towers(
        base,
        {
            "text": {"family": "vembed_clip", "arch": "tiny", "config": {"projection_dim": 8}, "freeze": "all"},
            "image": {"projection": {"kind": "mlp"}},
            "embedding_dim": 8,
        },
    )
    config = StandardValueConverter().structure(values, ComposedConfig)
    tiny = get_resolver().resolve(ModelFamily, key="vembed_clip").maybe_get_arch_config("tiny")
    assert config.text.config == replace(tiny, projection_dim=8)  # type: ignore[type-var]
    assert (config.text.freeze, config.image.projection.kind, config.embedding_dim) == ("all", "mlp", 8)
    assert config.image.config == CLIP
    # What was resolved once resolves to itself.
    assert resolve_towers(ComposedConfig(), values) == values


def test_encoders_that_cannot_be_found_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_towers(ComposedConfig(), {"text": {"path": "/no/such/folder"}, "image": {"name": "openai_klip"}})
    assert [e.partition(":")[0] for e in caught.value.errors] == ["`text`", "`image`"]
    assert "/no/such/folder does not exist" in str(caught.value)
    assert "openai_klip is neither a folder nor the name of a card. Did you mean 'openai_clip" in str(caught.value)
    for own, error in (
        ({"name": "google_bert_base_uncased", "family": "vembed_clip"}, "is of family vembed_bert"),
        ({"name": "google_bert_base_uncased", "arch": "tiny"}, "`arch` is for random weights"),
        ({"family": "vembed_bird"}, "`family` 'vembed_bird' is not a family of embedding models. Did you mean"),
        ({"family": "vembed_bert", "arch": "tinny"}, "`arch` 'tinny' is not known"),
    ):
        with pytest.raises(ConfigError, match=error):
            resolve_towers(ComposedConfig(), {"text": own})
    with pytest.raises(ConfigError, match=r"`text\.path` is for new models"):
        refuse_sources(CONFIG, {"text": {"path": "folder"}, "image": {"family": "vembed_clip"}})


@pytest.mark.parametrize("where", ["folder", "repository", "run"])
def test_encoders_with_code_of_their_own_are_refused(where: str, tmp_path: Path) -> None:
    if where == "run":
        tmp_path.joinpath("checkpoints").mkdir()
        metadata = {"model_family": "vembed_auto", "model_config": {"hf_config": {}, "trust_remote_code": True}}
        tmp_path.joinpath("checkpoints/model.yaml").write_text(json.dumps(metadata))
    else:
        code = "own.Model" if where == "folder" else "somebody/else--own.Model"
        config = {"model_type": "no_type_of_transformers", "auto_map": {"AutoModel": code}}
        tmp_path.joinpath("config.json").write_text(json.dumps(config))
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"`text`: `path`: .* needs Python code .* Composed models do not support"):
        resolve_towers(ComposedConfig(), {"text": {"path": str(tmp_path)}})


def test_an_encoder_may_not_ask_for_code() -> None:
    trusted = {"hf_config": {"model_type": "electra"}, "trust_remote_code": True}
    errors = config_errors(TowerConfig(family="vembed_auto", config=trusted))
    assert any("`config.trust_remote_code` must not be set" in error for error in errors)


def test_folder_with_a_broken_configuration_is_refused() -> None:
    checkpoint_format = ComposedCheckpointFormat()
    values: Any = StandardValueConverter().unstructure(CONFIG)
    assert checkpoint_format.from_hf_config({"model_config": values}) == CONFIG
    values["text"]["config"]["hidden"] = 1
    with pytest.raises(ModelLoadError, match="hidden"):
        checkpoint_format.from_hf_config({"model_config": values})
    values["text"]["config"].pop("hidden")
    values["image"]["family"] = "vembed_absent"
    with pytest.raises(ModelLoadError, match="`image`: `family` 'vembed_absent' is not a family of embedding models"):
        checkpoint_format.from_hf_config({"model_config": values})


def image_size_of(config: object) -> int | None:
    """The image size in a configuration, wherever it is."""
    if not is_dataclass(config):
        return None
    size = getattr(config, "image_size", None)
    found = [size] + [image_size_of(getattr(config, f.name)) for f in fields(config)]
    return next((s for s in found if isinstance(s, int)), None)


def test_any_family_with_a_small_architecture_can_be_composed() -> None:
    resolver = get_resolver()
    used = []
    for name in embedding_families(resolver):
        family = resolver.resolve(ModelFamily, key=name)
        arch = family.maybe_get_arch_config("tiny") if name != COMPOSED_FAMILY else None
        if arch is None:
            continue
        gangs = create_fake_gangs(CPU)
        whole = family.create_new_model(arch, gangs, torch.float32, meta=family.supports_meta, init_rank0_only=False)
        assert isinstance(whole, EmbeddingModel)
        for modality in whole.modalities:
            config = replace(CONFIG, **{modality: TowerConfig(family=name, config=arch)})
            if whole.is_interleaved:
                # A joint encoder has no tower to take out.
                with pytest.raises(ConfigError, match=f"The {modality} encoder of {name} models cannot be used alone"):
                    create(config)
                continue
            model = create(config).train()
            batch = batch_for(modality, model, arch)
            model(batch).values.sum().backward()
            tower = getattr(model, modality)
            unused = {n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None}
            assert not unused, (name, unused)
            model.eval()
            with torch.no_grad():
                torch.testing.assert_close(reloaded(model, config)(batch).values, model(batch).values, rtol=0, atol=0)
            used.append((name, modality))
    assert {("vembed_bert", "text"), ("vembed_clip", "text"), ("vembed_clip", "image")} <= set(used)


def reloaded(model: ComposedModel, config: ComposedConfig) -> ComposedModel:
    """What a checkpoint of the model is loaded as: created without memory, filled with its tensors."""
    family = get_resolver().resolve(ModelFamily, key=COMPOSED_FAMILY)
    gangs = create_fake_gangs(CPU)
    empty = family.create_new_model(config, gangs, torch.float32, meta=True, init_rank0_only=False)
    to_empty(empty, CPU)
    empty.load_state_dict(model.state_dict())
    reset_non_persistent_buffers(empty)
    assert isinstance(empty, ComposedModel)
    return empty.eval()


def batch_for(modality: str, model: ComposedModel, config: object) -> EncoderBatch:
    if modality == "image":
        size = image_size_of(config) or 16
        return EncoderBatch.of_images(torch.randn(2, 3, size, size))
    length = model.max_text_length if model.text_padding == "max_length" else 6
    assert length is not None
    return EncoderBatch.of_text(torch.randint(3, 48, (2, length)), torch.ones(2, length, dtype=torch.bool))

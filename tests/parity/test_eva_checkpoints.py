"""EVA-CLIP checkpoints of open_clip, and of our own layout, are read and written exactly."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import pytest
import timm
import torch
from fairseq2.models import ModelFamily
from fairseq2.models.hg import save_hugging_face_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from vembed_fs2 import Embedder
from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.hub.load import load_model
from vembed_fs2.models.eva import EVA_FAMILY, EVA_FORMAT, EvaConfig, EvaModel
from vembed_fs2.models.eva.open_clip import (
    OPEN_CLIP,
    TIMM_MODELS,
    config_from_open_clip,
    config_to_open_clip,
)
from vembed_fs2.resolver import get_resolver

from .eva_models import (
    Example,
    create_images,
    create_pair,
    create_texts,
    models,
    small_cfg,
    small_options,
    timm_model,
    vision_config,
)
from .open_clip_models import write_folder
from .test_open_clip_folder import CLIP_VOCAB, assert_same_ids, assert_same_vectors


@settings(max_examples=30)
@given(models(), st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
def test_round_trip_is_exact(example: Example, dtype: torch.dtype) -> None:
    options, model_cfg = example
    reference, model, config = create_pair(options, model_cfg)
    state = dict(reference.to(dtype).state_dict())
    ours = OPEN_CLIP.state_dict_from_open_clip(dict(state), config)
    assert ours.keys() == model.state_dict().keys()
    back = OPEN_CLIP.state_dict_to_open_clip(dict(ours), config)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        value = back[key]
        assert isinstance(value, Tensor)
        assert value.dtype == tensor.dtype
        assert value.shape == tensor.shape
        assert torch.equal(value, tensor)


@settings(max_examples=30)
@given(models())
def test_configuration_comes_back(example: Example) -> None:
    options, model_cfg = example
    # The channels and the dropout on attention weights are no options of open_clip.
    with timm_model(options):
        config = config_from_open_clip(model_cfg)
        written = config_to_open_clip(config)
        assert config_from_open_clip(json.loads(json.dumps(written))) == config
    vision_cfg = model_cfg["vision_cfg"]
    for name, value in vision_cfg.items():
        is_unused = (name == "timm_proj_bias" and vision_cfg["timm_proj"] is None) or value == ""
        if name != "timm_model_pretrained" and not is_unused:
            assert written["vision_cfg"][name] == value, name
    for name, value in model_cfg["text_cfg"].items():
        assert written["text_cfg"][name] == value, name
    assert {k: written[k] for k in ("embed_dim", "quick_gelu", "custom_text")} == {
        k: model_cfg[k] for k in ("embed_dim", "quick_gelu", "custom_text")
    }


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_names_stand_for_what_timm_makes_of_them(name: str) -> None:
    with mock.patch("timm.models.eva._create_eva", lambda variant, pretrained, **options: options):
        options = timm.model_entrypoint(name)()
    options.setdefault("img_size", timm.get_pretrained_cfg(name).input_size[-1])
    assert TIMM_MODELS[name] == vision_config(options)


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("EVA01-g-14", "eva01_giant_patch14"),
        ("EVA01-g-14-plus", "eva01_giant_patch14_plus"),
        ("EVA02-B-16", "eva02_base_patch16"),
        ("EVA02-L-14", "eva02_large_patch14"),
        ("EVA02-L-14-336", "eva02_large_patch14_336"),
        ("EVA02-E-14", "eva02_enormous_patch14"),
        ("EVA02-E-14-plus", "eva02_enormous_patch14_plus"),
    ],
)
def test_architectures_are_those_of_open_clip(name: str, arch: str) -> None:
    model_cfg = open_clip.get_model_config(name)
    config = config_from_open_clip(model_cfg)
    assert config == get_resolver().resolve(ModelFamily, key=EVA_FAMILY).maybe_get_arch_config(arch)
    assert config_to_open_clip(config)["vision_cfg"]["timm_model_name"] == model_cfg["vision_cfg"]["timm_model_name"]


@pytest.mark.parametrize(
    ("vision", "field"),
    [
        ({"timm_model_name": "eva02_huge"}, "vision_cfg.timm_model_name.*eva02_huge"),
        ({"timm_model_name": "eva02_base_patch16_clip_224", "image_size": 448}, "vision_cfg.image_size.*448"),
        ({"timm_pool": "map"}, "vision_cfg.timm_pool.*map"),
        ({"timm_pool": ""}, "vision_cfg.timm_pool"),
        ({"timm_proj": "conv"}, "vision_cfg.timm_proj.*conv"),
        ({"timm_proj": "none"}, "projection_dim"),
        ({"patch_dropout": 0.5}, "vision_cfg.patch_dropout"),
        ({"timm_drop": 1.0}, "head_dropout_p"),
        ({"timm_size": 1}, "vision_cfg.timm_size"),
    ],
)
def test_unsupported_options_are_refused_by_name(vision: dict[str, Any], field: str) -> None:
    with timm_model(small_options()), pytest.raises(ModelLoadError, match=field):
        config_from_open_clip(small_cfg(**vision))


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(ModelLoadError, match="Did you mean 'eva02_base_patch16_clip_224'"):
        config_from_open_clip(small_cfg(timm_model_name="eva02_base_patch16_clip"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"gated_ffn": False}, "`gated_ffn`"),
        ({"num_channels": 1}, "`num_channels`"),
        ({"image_size": 100}, "`image_size` 100"),
        ({"attn_dropout_p": 0.5}, "`attn_dropout_p`"),
    ],
)
def test_what_open_clip_has_no_name_for_is_not_written(change: dict[str, Any], field: str) -> None:
    config = EvaConfig()
    config.vision = replace(config.vision, **change)
    with pytest.raises(VembedError, match=field):
        config_to_open_clip(config)


def test_unknown_tensors_are_not_dropped() -> None:
    reference, model, config = create_pair(small_options(), small_cfg())
    state = dict(reference.state_dict())
    state["visual.trunk.blocks.0.attn.extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"visual.trunk.blocks.0.attn.extra\""):
        model.load_state_dict(OPEN_CLIP.state_dict_from_open_clip(state, config))


def test_models_without_custom_text_are_read() -> None:
    reference, model, config = create_pair(small_options(), small_cfg())
    state = {key.removeprefix("text."): value for key, value in reference.state_dict().items()}
    ours = OPEN_CLIP.state_dict_from_open_clip(state, config)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in ours.items())
    assert ours.keys() == model.state_dict().keys()


def test_bias_of_the_logits_is_kept() -> None:
    model_cfg = small_cfg() | {"init_logit_bias": -10.0, "init_logit_scale": 1.5}
    with timm_model(small_options()):
        config = config_from_open_clip(model_cfg)
        written = config_to_open_clip(config)
    assert (config.logit_scale_init, config.logit_bias_init) == (1.5, -10.0)
    assert (written["init_logit_scale"], written["init_logit_bias"]) == (1.5, -10.0)
    state: dict[str, object] = {"logit_bias": torch.tensor(-3.0), "logit_scale": torch.tensor(2.0)}
    ours = OPEN_CLIP.state_dict_from_open_clip(dict(state), config)
    assert ours == {"logit_bias": torch.tensor([-3.0]), "logit_scale": torch.tensor([2.0])}
    assert OPEN_CLIP.state_dict_to_open_clip(ours, config) == state


def test_folder_of_our_own_layout(tmp_path: Path) -> None:
    _, model, config = create_pair(small_options(), small_cfg())
    save_hugging_face_model(
        tmp_path, EVA_FORMAT.to_hg_state_dict(dict(model.state_dict()), config), EVA_FORMAT.to_hg_config(config)
    )
    saved = json.loads(tmp_path.joinpath("config.json").read_text())
    assert saved["model_type"] == EVA_FAMILY
    assert EVA_FORMAT.from_hf_config(saved) == config
    _assert_same_outputs(load_model(tmp_path), model, config)


def test_folder_of_open_clip(tmp_path: Path) -> None:
    model_cfg = small_cfg()
    reference, model, config = create_pair(small_options(), model_cfg)
    content = {"model_cfg": model_cfg, "preprocess_cfg": {"size": [8, 8]}}
    tmp_path.joinpath("open_clip_config.json").write_text(json.dumps(content))
    save_file(dict(reference.state_dict()), tmp_path / "open_clip_model.safetensors")
    with timm_model(small_options()):
        _assert_same_outputs(load_model(tmp_path), model, config)


def test_embedder_prepares_inputs_as_open_clip_and_writes_them_again(tmp_path: Path) -> None:
    text = {"context_length": 24, "vocab_size": CLIP_VOCAB, "width": 16, "heads": 2, "layers": 2}
    model_cfg = small_cfg(timm_proj="linear", timm_pool="avg") | {"text_cfg": text}
    with timm_model(small_options()):
        write_folder(tmp_path / "first", model_cfg, {"resize_mode": "squash"})
        embedder = Embedder.load(tmp_path / "first", device="cpu")
        assert isinstance(embedder.model, EvaModel)
        assert_same_ids(embedder, tmp_path / "first")
        assert_same_vectors(tmp_path / "first", embedder)
        embedder.save_open_clip(tmp_path / "again")
        first, again = (load_file(tmp_path / f / "open_clip_model.safetensors") for f in ("first", "again"))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert_same_vectors(tmp_path / "again")
        embedder.save_hf(tmp_path / "own")
        reloaded = Embedder.load(tmp_path / "own", device="cpu")
        assert_same_vectors(tmp_path / "first", reloaded)


def _assert_same_outputs(loaded: Any, model: EvaModel, config: EvaConfig) -> None:
    assert isinstance(loaded, EvaModel)
    ids, mask = create_texts(config)
    with torch.no_grad():
        for batch in (EncoderBatch.of_text(ids, mask), EncoderBatch.of_images(create_images(config))):
            assert torch.equal(loaded(batch).values, model(batch).values)


def test_config_is_plain_data() -> None:
    assert EVA_FORMAT.from_hf_config({"model_config": asdict(EvaConfig())}) == EvaConfig()

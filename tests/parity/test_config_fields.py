"""An exported folder has all fields of the ``config.json`` that was read, whether or not they mean anything here."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq2.models.hg import save_hugging_face_model
from fairseq2.utils.structured import StandardValueConverter
from fairseq2.utils.yaml import YamlDumper, YamlLoader

from vembed_fs2 import Embedder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.embedding.learned import EmbeddingModelConfig
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.hub.find import find_model
from vembed_fs2.models.composed import ComposedConfig
from vembed_fs2.models.composed.config import TowerConfig
from vembed_fs2.models.composed.interop import ComposedCheckpointFormat
from vembed_fs2.models.family import PlainCheckpointFormat, get_checkpoint_format, read_folder_config
from vembed_fs2.resolver import get_resolver

from .open_clip_models import small_cfg, with_vision, write_folder
from .text_backbones import write_wordpiece

TEXT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip

IMAGE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip

DECODER = TEXT | {"num_key_value_heads": 1, "head_dim": 8}

VISION_TOWER: dict[str, Any] = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 4, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "num_position_embeddings": 16, "out_hidden_size": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip

VL_TOKENS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}

MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}

PATCHES = {k: v for k, v in IMAGE.items() if k != "image_size"} | {"num_patches": 9}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", TEXT),
    "roberta": ("Roberta", TEXT | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", TEXT | {"pad_token_id": 1}),
    "camembert": ("Camembert", TEXT | {"pad_token_id": 1}),
    "distilbert": ("DistilBert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 64}),
    "mpnet": ("MPNet", TEXT | {"pad_token_id": 1}),
    "modernbert": ("ModernBert", TEXT | {"pad_token_id": 0}),
    "vit": ("ViT", IMAGE),
    "vit_mae": ("ViTMAE", IMAGE),
    "dinov2": ("Dinov2", IMAGE),
    "dinov2_with_registers": ("Dinov2WithRegisters", IMAGE),
    "dinov3_vit": ("DINOv3ViT", IMAGE),
    "clip": ("CLIP", {"text_config": TEXT, "vision_config": IMAGE}),
    "siglip": ("Siglip", {"text_config": TEXT, "vision_config": IMAGE}),
    "siglip2": ("Siglip2", {"text_config": TEXT, "vision_config": PATCHES}),
    "siglip_text_model": ("SiglipText", TEXT),
    "siglip2_vision_model": ("Siglip2Vision", PATCHES),
    "qwen3": ("Qwen3", DECODER),
    "qwen3 with windows": (
        "Qwen3",
        DECODER | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2": ("Qwen2", DECODER | {"num_key_value_heads": 2}),
    "mistral": ("Mistral", DECODER),
    "llama": ("Llama", DECODER),
    "qwen3_vl": (
        "Qwen3VL",
        {"text_config": DECODER | {"rope_scaling": MROPE}, "vision_config": VISION_TOWER, **VL_TOKENS},
    ),
    "electra": ("Electra", TEXT | {"embedding_size": 8}),
}

WRITTEN_ANEW = {"architectures", "dtype", "transformers_version"}

FIXED = {
    # transformers itself checks these, or a family refuses other values.
    *("add_cross_attention", "is_decoder", "is_encoder_decoder", "output_attentions", "position_embedding_type"),
    *("pruned_heads", "vision_use_head", "model_type", "return_dict", "out_features", "out_indices", "stage_names"),
    *(
        "attention_type",
        "layer_types",
        "rope_scaling",
        "summary_type",
        "pos_embed_rescale",
        "pos_embed_jitter",
        "pos_embed_shift",
        "local_attention",
        "hidden_activation",
        "pretraining_tp",
    ),
}

CHOICES: dict[str, list[Any]] = {
    "problem_type": ["regression", "single_label_classification"],
    "id2label": [{"0": "a cat", "1": "a dog"}],
    "label2id": [{"a cat": 0, "a dog": 1}],
    "classifier_pooling": ["cls", "mean"],
    "hidden_act": ["gelu", "relu"],
    "activation": ["gelu", "relu"],
}

Draw = random.Random


def randomize(values: dict[str, Any], sizes: dict[str, Any], draw: Draw) -> dict[str, Any]:
    """Give each field a value of its own, but not those that say how large tensors are."""
    found = {name: values[name] if name in sizes else random_value(name, value, draw) for name, value in values.items()}
    return found | {"of_a_later_version": {"deep": [1, None, 2.5], "true": True}, "note": "für später"}


def random_value(name: str, value: Any, draw: Draw) -> Any:
    if name in FIXED or name in WRITTEN_ANEW:
        return value
    if name in CHOICES:
        return draw.choice(CHOICES[name])
    if name.endswith("_token_id"):
        return draw.randint(2, 40)
    if isinstance(value, bool):
        return draw.random() < 0.5
    if isinstance(value, int):
        return value if name.startswith(("num_", "mlp_", "attention_", "relative_", "global_")) else draw.randint(1, 9)
    if isinstance(value, float):
        return round(draw.uniform(0.01, 0.4), 3)
    return draw.choice([value, 3, "text", ["a", 2]]) if value is None and "drop" not in name else value


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder whose ``config.json`` has random values, and its content."""
    name, sizes = MODELS[request.param]
    config = getattr(transformers, f"{name}Config")(**sizes)
    folder = tmp_path / "model"
    torch.manual_seed(0)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)

    draw = Draw(request.param)
    content = json.loads(config.to_json_string(use_diff=False))
    shapes = {*sizes, *TEXT, *IMAGE, *PATCHES, *DECODER, *VISION_TOWER} | SHAPES
    content = {
        k: randomize(v, shapes, draw) if k in ("text_config", "vision_config") else v for k, v in content.items()
    }
    content = {"architectures": ["Other"], **randomize(content, {"text_config", "vision_config", *shapes}, draw)}
    content.pop("dtype", None)
    folder.joinpath("config.json").write_text(json.dumps(content))
    return folder, content


SHAPES = {
    *("projection_dim", "type_vocab_size", "use_mask_token", "qkv_bias", "pooler_output_size", "projection_size"),
    *("use_swiglu_ffn", "use_gated_mlp", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
    *("attention_bias", "norm_bias", "num_channels", "use_mean_pooling", "max_position_embeddings", "rope_theta"),
    *("sinusoidal_pos_embds", "pooler_act", "mlp_ratio", "vocab_size", "mask_ratio", "decoder_hidden_size"),
}
"""What else says which tensors there are."""


def assert_given_back(written: dict[str, Any], content: dict[str, Any], path: str = "") -> None:
    for name, value in content.items():
        if name in WRITTEN_ANEW:
            continue
        assert name in written, f"{path}{name} is lost"
        if name in ("text_config", "vision_config"):
            assert_given_back(written[name], value, f"{name}.")
        else:
            assert written[name] == value, f"{path}{name}"


def test_every_field_comes_back(case: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, content = case
    source = find_model(folder)
    checkpoint_format = get_checkpoint_format(source.family, get_resolver())
    assert checkpoint_format is not None
    out = tmp_path / "out"
    out.mkdir()
    # As a run keeps it.
    values: Any = StandardValueConverter().unstructure(source.config)
    get_resolver().resolve(YamlDumper).dump(values, tmp_path / "model.yaml")
    (values,) = get_resolver().resolve(YamlLoader).load(tmp_path / "model.yaml")
    config: Any = StandardValueConverter().structure(values, type(source.config))
    assert config == source.config

    checkpoint_format.write_config(out, config)
    written = json.loads(out.joinpath("config.json").read_text())
    assert_given_back(written, content)
    assert written["architectures"] != ["Other"]
    assert written["transformers_version"] == transformers.__version__

    # What is written means the same, and is written the same again.
    shutil.copy(folder / "model.safetensors", out / "model.safetensors")
    again = find_model(out)
    assert again.config == source.config or source.family == "vembed_auto"
    checkpoint_format.write_config(out, again.config)
    assert json.loads(out.joinpath("config.json").read_text()) == written


def test_what_is_changed_here_is_written_as_it_is_now(case: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, content = case
    source = find_model(folder)
    part, name = {
        "vembed_bert": ("", "attn_dropout_p"),
        "vembed_modernbert": ("", "attn_dropout_p"),
        "vembed_qwen3": ("", "attn_dropout_p"),
        "vembed_qwen3_vl": ("", "attn_dropout_p"),
        "vembed_vit": ("", "layer_norm_eps"),
        "vembed_clip": ("text", "attn_dropout_p"),
        "vembed_siglip": ("text" if getattr(source.config, "text", None) else "vision", "attn_dropout_p"),
    }.get(source.family, ("", ""))
    if not name:
        pytest.skip("wrapped models keep the whole file")
    setattr(getattr(source.config, part) if part else source.config, name, 0.625)
    checkpoint_format = get_checkpoint_format(source.family, get_resolver())
    assert checkpoint_format is not None
    checkpoint_format.write_config(tmp_path, source.config)
    assert json.loads(tmp_path.joinpath("config.json").read_text()) != content
    assert "0.625" in tmp_path.joinpath("config.json").read_text()


@pytest.mark.parametrize("write", ["save_hf", "save_sentence_transformers"])
def test_a_folder_is_exported_with_its_special_tokens(write: str, tmp_path: Path) -> None:
    """And transformers, as well as fairseq2's own export, find them."""
    config = transformers.ModernBertConfig(
        **TEXT | {"vocab_size": 300},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        num_labels=3,
    )
    transformers.ModernBertModel(config).save_pretrained(tmp_path / "model")
    write_wordpiece(tmp_path / "model")
    embedder = Embedder.load(tmp_path / "model", device="cpu")
    getattr(embedder, write)(tmp_path / "out")

    checkpoint_format = get_checkpoint_format("vembed_modernbert", get_resolver())
    assert checkpoint_format is not None
    state = checkpoint_format.to_hg_state_dict(dict(embedder.model.state_dict()), embedder.source.config)
    save_hugging_face_model(tmp_path / "own", state, checkpoint_format.to_hg_config(embedder.source.config))

    for folder in ("out", "own"):
        read = transformers.AutoConfig.from_pretrained(tmp_path / folder)
        assert [read.bos_token_id, read.eos_token_id, read.cls_token_id, read.sep_token_id] == [1, 2, 1, 2]
        assert read.id2label == config.id2label


def test_the_older_copies_of_clips_fields_are_merged(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    content["text_config_dict"] = {**content["text_config"], "id2label": {"0": "x"}, "attention_dropout": 0.25}
    file.write_text(json.dumps(content))
    Embedder.load(tmp_path / "model", device="cpu").save_hf(tmp_path / "out")
    written = json.loads(tmp_path.joinpath("out", "config.json").read_text())
    assert "text_config_dict" not in written
    assert (written["text_config"]["id2label"], written["text_config"]["attention_dropout"]) == ({"0": "x"}, 0.25)


def test_a_classifier_of_images_keeps_the_fields_of_its_image_model(tmp_path: Path) -> None:
    """Its folder has the configuration of both Transformers, and one of them."""
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE | {"note": "kept"})
    transformers.SiglipForImageClassification(config).save_pretrained(tmp_path)
    source = find_model(tmp_path)
    checkpoint_format = get_checkpoint_format(source.family, get_resolver())
    assert checkpoint_format is not None
    written = json.loads(json.dumps(checkpoint_format.describe_config(source.config)))
    checkpoint_format.write_config(tmp_path, source.config)
    final = json.loads(tmp_path.joinpath("config.json").read_text())
    assert final["model_type"] == "siglip_vision_model"
    assert final["note"] == "kept"
    assert not {"text_config", "vision_config"} & {*final, *written}


def test_a_family_that_transformers_does_not_have_keeps_what_others_added(tmp_path: Path) -> None:
    values = {"model_type": "vembed_toy", "model_config": {"logit_scale_init": 1.0}, "note": {"a": [1]}, "version": 3}
    tmp_path.joinpath("config.json").write_text(json.dumps(values))
    tmp_path.joinpath("model.safetensors").touch()
    plain = PlainCheckpointFormat("vembed_toy", EmbeddingModelConfig)
    config = plain.from_hf_config(values)
    config.extra_fields = {"config.json": plain.find_extra_fields(values, config)}
    plain.write_config(tmp_path, config)
    written = json.loads(tmp_path.joinpath("config.json").read_text())
    assert (written["note"], written["version"]) == ({"a": [1]}, 3)
    assert "extra_fields" not in written["model_config"]


def test_so_does_a_composed_model(tmp_path: Path) -> None:
    text = TowerConfig(family="vembed_bert", arch="minilm_l6")
    config = ComposedConfig(text=text, image=TowerConfig(family="vembed_vit", arch="tiny"))
    composed = ComposedCheckpointFormat()
    composed.write_config(tmp_path, config)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text()) | {"note": "kept", "id2label": {"0": "x"}}
    again = composed.from_hf_config(content)
    again.extra_fields = {"config.json": composed.find_extra_fields(content, again)}
    composed.write_config(tmp_path, again)
    assert json.loads(file.read_text()) == content


OPEN_CLIP: dict[str, dict[str, Any]] = {
    "plain": small_cfg() | {"custom_text": True, "nonscalar_logit_scale": False, "init_logit_bias": None},
    "options": small_cfg(eos_id=7, hf_proj_type="mlp", mlp_ratio=3.7362, act_kwargs={}, norm_kwargs=None)
    | with_vision(timm_drop=0.25, attn_pooler_heads=3, output_tokens=False, patch_dropout=0)
    | {"output_dict": False},
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clips_file_comes_back(name: str, tmp_path: Path) -> None:
    cfg = OPEN_CLIP[name]
    cfg["text_cfg"] |= {"vocab_size": 49_408}
    preprocess = {"size": [8, 8], "mode": "RGB", "mean": [0.5, 0.4, 0.3], "resize_mode": "squash"}
    write_folder(tmp_path / "model", cfg, preprocess)
    file = tmp_path / "model" / "open_clip_config.json"
    content = json.loads(file.read_text()) | {"version": "of a later version"}
    file.write_text(json.dumps(content))

    Embedder.load(tmp_path / "model", device="cpu").save_open_clip(tmp_path / "out")
    written = ModelFolder.open(tmp_path / "out").config
    full = json.loads(tmp_path.joinpath("out", "open_clip_config.json").read_text())
    assert full["version"] == "of a later version"
    for part in ("text_cfg", "vision_cfg"):
        assert_given_back(written["model_cfg"].pop(part), content["model_cfg"].pop(part), f"{part}.")
    assert_given_back(written["model_cfg"], content["model_cfg"])
    assert_given_back(written["preprocess_cfg"], preprocess)

    # In transformers' layout they have no place.
    if name == "plain":
        Embedder.load(tmp_path / "model", device="cpu").save_hf(tmp_path / "hf")
        assert "version" not in json.loads(tmp_path.joinpath("hf", "config.json").read_text())


def test_extra_fields_that_contradict_the_model_are_left_out(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", small_cfg(vocab_size=49_408, act_kwargs={"approximate": "none"}))
    embedder = Embedder.load(tmp_path / "model", device="cpu")
    embedder.source.config.text.activation = embedder.source.config.vision.activation = "quick_gelu"
    embedder.save_open_clip(tmp_path / "out")
    written = ModelFolder.open(tmp_path / "out").config["model_cfg"]
    assert written["quick_gelu"] is True
    assert "act_kwargs" not in written["text_cfg"]


def test_a_folder_without_extra_fields_has_none(tmp_path: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**TEXT)).save_pretrained(tmp_path)
    source = find_model(tmp_path)
    checkpoint_format = get_checkpoint_format(source.family, get_resolver())
    assert checkpoint_format is not None
    assert read_folder_config(tmp_path, checkpoint_format).extra_fields == {}

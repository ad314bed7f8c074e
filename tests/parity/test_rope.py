"""``rope_parameters`` of transformers 5 means what the older fields mean, for wrapped models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.auto import AutoCheckpointFormat
from vembed_fs2.models.auto.backbone import find_backbone
from vembed_fs2.models.auto.run import run_text

BASE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LONG = {"rope_type": "longrope", "short_factor": [1.1, 1.5, 2.0, 3.0] * 2, "long_factor": [2.0, 3.0, 4.0, 5.0] * 2}

SCALINGS = {"linear": LINEAR, "dynamic": DYNAMIC, "yarn": YARN, "llama3": LLAMA3, "longrope": LONG}


def run(model_type: str, **fields: Any) -> Tensor:
    backbone = find_backbone({**BASE, "model_type": model_type, **fields})
    torch.manual_seed(0)
    model = backbone.create().eval()
    ids = torch.arange(1, 25).unsqueeze(0)
    with torch.no_grad():
        states = run_text(model, backbone, ids, None, None).states
    assert states is not None
    return states


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_every_kind_equals_the_older_spelling(model_type: str, kind: str) -> None:
    scaling = dict(SCALINGS[kind])
    longer: dict[str, Any] = {"original_max_position_embeddings": 30} if kind == "longrope" else {}
    older = run(model_type, rope_theta=5e5, rope_scaling=scaling, **longer)

    newer = run(model_type, rope_parameters={"rope_theta": 5e5, **scaling, **longer})

    assert torch.equal(newer, older)
    if kind != "dynamic":  # Which stretches positions beyond the limit only.
        assert (newer - run(model_type, rope_theta=5e5)).abs().max() > 0.01


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral", "gemma", "gpt_neox", "phi3"])
def test_the_base_equals_the_older_spelling(model_type: str) -> None:
    older_name = "rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"
    older = run(model_type, **{older_name: 1e6})

    newer = run(model_type, rope_parameters={"rope_type": "default", "rope_theta": 1e6})

    assert torch.equal(newer, older)
    assert (newer - run(model_type)).abs().max() > 0.01


@pytest.mark.parametrize(("model_type", "name"), [("phi3", "partial_rotary_factor"), ("gpt_neox", "rotary_pct")])
def test_rotation_of_a_part(model_type: str, name: str) -> None:
    newer = run(model_type, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})

    assert torch.equal(newer, run(model_type, **{name: 0.5}))


@pytest.mark.parametrize("model_type", ["stablelm", "olmo2"])
def test_older_classes_want_two_fields(model_type: str) -> None:
    older = run(model_type, rope_theta=1e5, rope_scaling={"type": "linear", "factor": 4.0})

    assert torch.equal(run(model_type, rope_parameters={"rope_theta": 1e5, **LINEAR}), older)


@pytest.mark.parametrize("scaling", [{}, LINEAR, YARN, LLAMA3])
def test_types_of_layers(scaling: dict[str, Any]) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    full = {"rope_type": "default", **scaling, "rope_theta": 5e5}
    nested = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    fields = {"rope_scaling": scaling} if scaling else {}

    newer = run("gemma3_text", rope_parameters=nested, **layers)

    assert torch.equal(newer, run("gemma3_text", rope_theta=5e5, rope_local_base_freq=50.0, **fields, **layers))


def test_layers_of_one_type(tmp_path: Path) -> None:
    layers = {"layer_types": ["full_attention"] * 2}
    entry = {"rope_theta": 5e5, **YARN}

    newer = run("olmo3", rope_parameters={"full_attention": entry, "sliding_attention": dict(entry)}, **layers)

    assert torch.equal(newer, run("olmo3", rope_theta=5e5, rope_scaling=YARN, **layers))


def test_the_older_field_beside_it_comes_first() -> None:
    """As in version 5."""
    newer = run("llama", rope_theta=1e5, rope_scaling=LINEAR, rope_parameters={"rope_type": "default"})

    assert torch.equal(newer, run("llama", rope_theta=1e5, rope_scaling=LINEAR))


def test_an_own_factor_of_longrope_counts_as_in_version_5() -> None:
    """Version 4 works it out by the lengths."""
    length = {"original_max_position_embeddings": 16}
    attention_factor = (1 + torch.tensor(8.0).log() / torch.tensor(16.0).log()).sqrt().item()

    newer = run("llama", rope_parameters={"rope_theta": 1e4, **LONG, **length, "factor": 8.0})

    older = run("llama", rope_scaling={**LONG, "attention_factor": attention_factor}, **length)
    assert torch.allclose(newer, older, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "parameters"),
    [
        ("electra", {"rope_type": "default", "rope_theta": 1e4}),
        ("llama", {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e3}}),
        ("gemma3_text", {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {**LINEAR, "rope_theta": 1e3}}),
        ("qwen3", [1e4]),
    ],
)
def test_what_version_4_has_no_word_for_is_refused(model_type: str, parameters: Any) -> None:
    with pytest.raises(ModelLoadError, match="rope_parameters"):
        run(model_type, rope_parameters=parameters)


def test_an_exported_folder_has_both_spellings(tmp_path: Path) -> None:
    parameters = {"rope_theta": 5e5, **YARN}
    fmt = AutoCheckpointFormat()
    config = fmt.from_hf_config({**BASE, "model_type": "qwen3", "rope_parameters": parameters})

    fmt.write_config(tmp_path, config)

    assert json.loads((tmp_path / "config.json").read_text())["rope_parameters"] == parameters
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (read.rope_theta, read.rope_scaling) == (5e5, YARN)


def test_the_limit_of_attention_scores_is_obeyed() -> None:
    """torch's own attention kernel, which transformers 4.57 would take, leaves it out."""
    fields = {"query_pre_attn_scalar": 16}

    limited = run("gemma2", attn_logit_softcapping=0.5, **fields)

    assert (limited - run("gemma2", attn_logit_softcapping=None, **fields)).abs().max() > 0.01

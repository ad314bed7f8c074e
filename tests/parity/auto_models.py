"""Small random configurations of models of transformers that have no family of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor

VOCAB: Final = 40

LENGTH: Final = 12
"""Texts have fewer tokens."""

ACTIVATIONS: Final = ("gelu", "relu", "silu", "gelu_new")

Draw = Callable[[st.SearchStrategy[Any]], Any]


def _bert(draw: Draw) -> dict[str, Any]:
    """What BERT and its kin share."""
    heads = draw(st.sampled_from((1, 2, 4)))
    return {
        "vocab_size": VOCAB,
        "hidden_size": heads * draw(st.sampled_from((4, 8))),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.sampled_from((8, 12, 24))),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "max_position_embeddings": 2 * LENGTH,
        "type_vocab_size": draw(st.integers(1, 2)),
    }


def _albert(draw: Draw) -> dict[str, Any]:
    values = _bert(draw)
    groups = draw(st.integers(1, values["num_hidden_layers"]))
    inner = draw(st.integers(1, 2))
    return values | {"embedding_size": 6, "num_hidden_groups": groups, "inner_group_num": inner}


def _electra(draw: Draw) -> dict[str, Any]:
    values = _bert(draw)
    return values | {"embedding_size": draw(st.sampled_from((6, values["hidden_size"])))}


def _deberta(draw: Draw) -> dict[str, Any]:
    relative = {
        "relative_attention": True,
        "pos_att_type": draw(st.sampled_from((["c2p"], ["p2c"], ["c2p", "p2c"]))),
        "max_relative_positions": draw(st.sampled_from((-1, 4))),
        "position_biased_input": draw(st.booleans()),
    }
    return _bert(draw) | {"type_vocab_size": 0} | (relative if draw(st.booleans()) else {})


def _deberta_v2(draw: Draw) -> dict[str, Any]:
    values = _deberta(draw)
    if values.get("relative_attention"):
        buckets = draw(st.sampled_from((-1, 4)))
        values |= {"position_buckets": buckets, "share_att_key": draw(st.booleans()), "norm_rel_ebd": "layer_norm"}
    return values


def _squeezebert(draw: Draw) -> dict[str, Any]:
    values = _bert(draw)
    groups = {f"{name}_groups": draw(st.sampled_from((1, 2, 4))) for name in ("q", "k", "v", "output")}
    return values | {"embedding_size": values["hidden_size"], "intermediate_groups": 4} | groups


def _roformer(draw: Draw) -> dict[str, Any]:
    return _bert(draw) | {"embedding_size": draw(st.sampled_from((None, 6))), "rotary_value": draw(st.booleans())}


def _camembert(draw: Draw) -> dict[str, Any]:
    return _bert(draw) | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def _decoder(draw: Draw) -> dict[str, Any]:
    heads = draw(st.sampled_from((2, 4)))
    return {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from((1, heads))),
        "head_dim": draw(st.sampled_from((4, 8))),
        "intermediate_size": draw(st.integers(8, 24)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "max_position_embeddings": 2 * LENGTH,
        "pad_token_id": draw(st.sampled_from((None, 0))),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _gpt2(draw: Draw) -> dict[str, Any]:
    return {"vocab_size": VOCAB, "n_embd": 16, "n_layer": draw(st.integers(1, 3)), "n_head": 2, "n_positions": 24} | {
        "activation_function": draw(st.sampled_from(ACTIVATIONS)),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "bos_token_id": 39,
        "eos_token_id": 39,
    }


def _t5(draw: Draw) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "d_model": 16,
        "d_kv": draw(st.sampled_from((4, 8))),
        "d_ff": 24,
        "num_layers": draw(st.integers(1, 3)),
        "num_heads": draw(st.sampled_from((1, 2))),
        "feed_forward_proj": draw(st.sampled_from(("relu", "gated-gelu"))),
    }


def _xlnet(draw: Draw) -> dict[str, Any]:
    return {"vocab_size": VOCAB, "d_model": 16, "n_layer": draw(st.integers(1, 3)), "n_head": 2, "d_inner": 24}


TEXT: Final[dict[str, Callable[[Draw], dict[str, Any]]]] = {
    "albert": _albert,
    "camembert": _camembert,
    "deberta": _deberta,
    "deberta-v2": _deberta_v2,
    "electra": _electra,
    "ernie": _bert,
    "gemma": _decoder,
    "gpt2": _gpt2,
    "llama": _decoder,
    "megatron-bert": _bert,
    "qwen2": _decoder,
    "rembert": lambda draw: _bert(draw) | {"input_embedding_size": 6},
    "roformer": _roformer,
    "squeezebert": _squeezebert,
    "t5": _t5,
    "xlnet": _xlnet,
}


def _vision(draw: Draw) -> dict[str, Any]:
    heads, patch = draw(st.sampled_from((1, 2))), draw(st.integers(2, 4))
    return {
        "hidden_size": heads * 8,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(8, 24)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "patch_size": patch,
        "image_size": patch * draw(st.integers(2, 4)),
        "num_channels": draw(st.sampled_from((1, 3))),
    }


def _beit(draw: Draw) -> dict[str, Any]:
    names = ("use_relative_position_bias", "use_absolute_position_embeddings", "use_mean_pooling", "use_mask_token")
    return _vision(draw) | {name: draw(st.booleans()) for name in names}


def _swin(draw: Draw) -> dict[str, Any]:
    return {
        "image_size": 16,
        "patch_size": 2,
        "num_channels": draw(st.sampled_from((1, 3))),
        "embed_dim": 8,
        "depths": [draw(st.integers(1, 2)), 1],
        "num_heads": [1, 2],
        "window_size": draw(st.sampled_from((2, 4))),
        "qkv_bias": draw(st.booleans()),
    }


def _stages(draw: Draw) -> dict[str, Any]:
    sizes = [8, draw(st.sampled_from((8, 16)))]
    return {"hidden_sizes": sizes, "depths": [1, draw(st.integers(1, 2))], "num_channels": 3, "image_size": 16}


def _convnext(draw: Draw) -> dict[str, Any]:
    return _stages(draw) | {"num_stages": 2, "patch_size": 2, "layer_scale_init_value": draw(st.sampled_from((0, 0.1)))}


def _resnet(draw: Draw) -> dict[str, Any]:
    return _stages(draw) | {"embedding_size": 8, "layer_type": draw(st.sampled_from(("basic", "bottleneck")))}


IMAGE: Final[dict[str, Callable[[Draw], dict[str, Any]]]] = {
    "beit": _beit,
    "convnext": _convnext,
    "convnextv2": _convnext,
    "data2vec-vision": _beit,
    "deit": _vision,
    "ijepa": _vision,
    "resnet": _resnet,
    "swin": _swin,
    "swinv2": _swin,
    "vit_msn": _vision,
}


def _dual(text: Callable[[Draw], dict[str, Any]], **text_values: Any) -> Callable[[Draw], dict[str, Any]]:
    def create(draw: Draw) -> dict[str, Any]:
        values = text(draw) | text_values
        return {
            "text_config": values,
            "vision_config": _vision(draw) | {"num_channels": 3},
            "projection_dim": draw(st.integers(3, 9)),
        }

    return create


def _clip_text(draw: Draw) -> dict[str, Any]:
    values = _bert(draw) | {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    del values["type_vocab_size"]
    return values


def _altclip(draw: Draw) -> dict[str, Any]:
    values = _dual(_camembert)(draw)
    values["text_config"] |= {"project_dim": 10}
    return values


def _align(draw: Draw) -> dict[str, Any]:
    """An EfficientNet of the smallest width and depth, whose features have 32 values."""
    vision = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "depthwise_padding": []}
    return {
        "text_config": _bert(draw),
        "vision_config": vision
        | {"hidden_dim": 16, "num_hidden_layers": 4, "hidden_act": draw(st.sampled_from(ACTIVATIONS))},
        "projection_dim": 32,
    }


def _groupvit(draw: Draw) -> dict[str, Any]:
    values = _dual(_clip_text)(draw)
    groups = {"depths": [1, 1], "num_group_tokens": [3, 0], "num_output_groups": [3, 2], "num_hidden_layers": 2}
    values["vision_config"] |= groups
    return values | {"projection_intermediate_dim": draw(st.integers(4, 12))}


BOTH: Final[dict[str, Callable[[Draw], dict[str, Any]]]] = {
    "align": _align,
    "altclip": _altclip,
    "chinese_clip": _dual(_bert),
    "clipseg": _dual(_clip_text),
    "groupvit": _groupvit,
    "metaclip_2": _dual(_clip_text),
    "owlv2": _dual(_clip_text),
    "owlvit": _dual(_clip_text),
}


@st.composite
def hf_configs(draw: st.DrawFn, kinds: dict[str, Callable[[Draw], dict[str, Any]]]) -> dict[str, Any]:
    """The content of a ``config.json``."""
    model_type = draw(st.sampled_from(sorted(kinds)))
    return {"model_type": model_type, **kinds[model_type](draw)}


def create_reference(hf_config: dict[str, Any], seed: int = 0) -> Any:
    """transformers' own model, with random weights and statistics everywhere."""
    torch.manual_seed(seed)
    values = {k: v for k, v in hf_config.items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(hf_config["model_type"], **values)
    kls = transformers.T5EncoderModel if hf_config["model_type"] == "t5" else transformers.AutoModel
    model = kls.from_config(config) if kls is transformers.AutoModel else kls(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.numel() > 0:
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return model.eval()


def create_texts(pad: int, num: int = 4) -> tuple[Tensor, Tensor]:
    """Ids and mask: texts of several lengths that end with the token 3, padded on the right."""
    ids = torch.randint(4, VOCAB - 2, (num, LENGTH - 1))
    lengths = torch.randint(2, LENGTH, (num,))
    mask = torch.arange(LENGTH - 1) < lengths[:, None]
    ids[torch.arange(num), lengths - 1] = 3
    return torch.where(mask, ids, pad), mask

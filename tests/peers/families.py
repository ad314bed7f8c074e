"""Small random models of each family: their configurations, tokenizers and image processors.

This runs under every version of transformers that is compared, and imports
nothing else of this project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal

import transformers

Values = dict[str, Any]

WORDS: Final = (
    *("a", "the", "man", "woman", "is", "are", "eating", "food", "sitting", "on", "bench", "and", "talk", "about"),
    *("weather", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "twice", "who", "wrote", "Faust", "play"),
)

ACTIVATIONS: Final = ("gelu", "relu", "silu", "gelu_new", "quick_gelu", "gelu_pytorch_tanh")

POSITIONS: Final = 40
"""Texts are shorter."""

Tokens = Literal["wordpiece", "bpe", "unigram"]


@dataclass(frozen=True)
class Family:
    """Models of one ``model_type``."""

    configure: Callable[[Random], Values]
    """Draws a configuration."""

    reads: frozenset[str]
    """``text``, ``image`` or both."""

    tokenizer: Tokens | None = None
    """The kind of its tokenizer."""

    processors: Sequence[str] = ()
    """The image processors it is used with, by the names of their slow classes in version 4."""

    kls: str | None = None
    """The class; the base model of the configuration, if ``None``."""

    options: Values | None = None
    """Further arguments of the class."""


def _heads(rng: Random) -> tuple[int, int]:
    """A size and a number of heads that divides it."""
    heads = rng.choice((1, 2, 4))
    return heads * rng.choice((8, 16)), heads


def _bert(rng: Random) -> Values:
    size, heads = _heads(rng)
    return {
        "hidden_size": size,
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "intermediate_size": rng.choice((24, 40)),
        "hidden_act": rng.choice(ACTIVATIONS),
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": rng.choice((1, 2)),
        "layer_norm_eps": rng.choice((1e-5, 1e-12)),
        "pad_token_id": 0,
    }


def _roberta(rng: Random) -> Values:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return _bert(rng) | ids | {"max_position_embeddings": POSITIONS + 2}


def _mpnet(rng: Random) -> Values:
    values = _roberta(rng) | {"relative_attention_num_buckets": 32}
    del values["type_vocab_size"]
    return values


def _distilbert(rng: Random) -> Values:
    size, heads = _heads(rng)
    return {
        "dim": size,
        "n_layers": rng.randint(1, 3),
        "n_heads": heads,
        "hidden_dim": rng.choice((24, 40)),
        "activation": rng.choice(("gelu", "relu", "silu")),
        "max_position_embeddings": POSITIONS,
        "sinusoidal_pos_embds": rng.random() < 0.5,
        "pad_token_id": 0,
    }


def _modernbert(rng: Random) -> Values:
    size, heads = _heads(rng)
    return {
        "hidden_size": size,
        "num_hidden_layers": rng.randint(2, 5),
        "num_attention_heads": heads,
        "intermediate_size": rng.choice((24, 40)),
        "hidden_activation": rng.choice(ACTIVATIONS),
        "max_position_embeddings": POSITIONS,
        "global_attn_every_n_layers": rng.choice((1, 2, 3)),
        "local_attention": rng.choice((4, 8, 128)),
        "attention_bias": rng.random() < 0.5,
        "mlp_bias": rng.random() < 0.5,
        "norm_bias": rng.random() < 0.5,
        "norm_eps": rng.choice((1e-5, 1e-3)),
        "classifier_pooling": rng.choice(("cls", "mean")),
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
        **_by_version(
            {
                "global_rope_theta": (theta := rng.choice((100.0, 160_000.0))),
                "local_rope_theta": (local := rng.choice((50.0, 10_000.0))),
            },
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": theta},
                    "sliding_attention": {"rope_type": "default", "rope_theta": local},
                }
            },
        ),
    }


def is_version_5() -> bool:
    return int(transformers.__version__.partition(".")[0]) >= 5


def _by_version(four: Values, five: Values) -> Values:
    return five if is_version_5() else four


ROPE_TYPES: Final = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def _scaling(rng: Random, kind: str, dim: int) -> tuple[Values, Values]:
    """How positions are stretched: keys of a ``rope_type``, and what version 4 wants outside of them."""
    if kind == "default":
        return {}, {}
    if kind in ("linear", "dynamic"):
        return {"factor": rng.choice((2.0, 4.0))}, {}
    if kind == "yarn":
        values: Values = {"factor": rng.choice((2.0, 4.0))}
        if rng.random() < 0.5:
            values["original_max_position_embeddings"] = rng.choice((8, 16))
        if rng.random() < 0.5:
            values |= {"beta_fast": 16.0, "beta_slow": 2.0}
        if rng.random() < 0.5:
            values["attention_factor"] = 1.3
        elif rng.random() < 0.5:
            values |= {"mscale": 0.7, "mscale_all_dim": 0.5}
        return values, {}
    if kind == "llama3":
        values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": rng.choice((2.0, 4.0))}
        return values | {"original_max_position_embeddings": rng.choice((8, 20))}, {}

    half = dim // 2
    values = {
        "short_factor": [rng.uniform(1, 2) for _ in range(half)],
        "long_factor": [rng.uniform(2, 8) for _ in range(half)],
    }
    if rng.random() < 0.5:
        values["attention_factor"] = 1.1
    original = {"original_max_position_embeddings": POSITIONS}
    return values, original


def rope(rng: Random, dim: int, *, kinds: Sequence[str] = ROPE_TYPES, partial: bool = False) -> Values:
    """Draw rotary positions, as the version at hand spells them."""
    kind = rng.choice(kinds)
    theta = rng.choice((100.0, 5e5, 1e6))
    share = rng.choice((0.5, 1.0)) if partial else 1.0
    scaling, outside = _scaling(rng, kind, int(dim * share))

    four: Values = {"rope_theta": theta, **outside}
    if scaling:
        four["rope_scaling"] = {"rope_type": kind, **scaling}
    five = {"rope_type": kind, "rope_theta": theta, **scaling, **outside}
    if partial:
        four["partial_rotary_factor"] = five["partial_rotary_factor"] = share
    return _by_version(four, {"rope_parameters": five})


def _decoder(rng: Random, *, partial: bool = False, kinds: Sequence[str] = ROPE_TYPES) -> Values:
    heads = rng.choice((2, 4))
    dim = rng.choice((8, 16))
    return {
        "hidden_size": heads * dim,
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice((1, heads)),
        "head_dim": dim,
        "intermediate_size": rng.choice((24, 40)),
        "hidden_act": rng.choice(("silu", "gelu", "relu")),
        "max_position_embeddings": POSITIONS * rng.choice((1, 2)),
        "rms_norm_eps": rng.choice((1e-6, 1e-5)),
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        **rope(rng, dim, partial=partial, kinds=kinds),
    }


def _qwen(rng: Random) -> Values:
    values = _decoder(rng)
    if rng.random() < 0.5:
        layers = rng.randint(0, values["num_hidden_layers"])
        values |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": layers}
    return values


def _qwen2(rng: Random) -> Values:
    values = _qwen(rng)
    del values["head_dim"]
    return values


def _qwen3(rng: Random) -> Values:
    return _qwen(rng) | {"attention_bias": rng.random() < 0.5}


def _llama(rng: Random) -> Values:
    return _decoder(rng) | {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}


def _mistral(rng: Random) -> Values:
    return _decoder(rng) | {"sliding_window": rng.choice((None, 5))}


def _phi3(rng: Random) -> Values:
    values = _decoder(rng, partial=True, kinds=("default", "longrope"))
    del values["head_dim"]
    return _with_type(values)


def _stablelm(rng: Random) -> Values:
    values = _decoder(rng, partial=True, kinds=("default", "linear", "dynamic"))
    del values["head_dim"], values["rms_norm_eps"]
    return values | {"use_qkv_bias": rng.random() < 0.5}


def _gpt_neox(rng: Random) -> Values:
    dim, heads = rng.choice((8, 16)), 2
    theta, share = rng.choice((100.0, 1e6)), rng.choice((0.5, 1.0))
    values = {
        "hidden_size": heads * dim,
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "intermediate_size": 24,
        "hidden_act": rng.choice(("gelu", "relu")),
        "max_position_embeddings": POSITIONS,
        "use_parallel_residual": rng.random() < 0.5,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    parameters = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    return values | _by_version({"rotary_emb_base": theta, "rotary_pct": share}, {"rope_parameters": parameters})


def _olmo2(rng: Random) -> Values:
    values = _decoder(rng, kinds=("default", "linear", "dynamic"))
    del values["head_dim"]
    return _with_type(values)


def _with_type(values: Values) -> Values:
    """Rename the kind as the older classes of version 4 want it."""
    if (scaling := values.get("rope_scaling")) is not None:
        values["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    return values


def _gemma3(rng: Random) -> Values:
    values = _decoder(rng)
    dim = values["head_dim"]
    activation = values.pop("hidden_act")
    for name in ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"):
        values.pop(name, None)

    kind = rng.choice(("default", "linear", "yarn", "llama3", "dynamic"))
    theta, local = rng.choice((100.0, 1e6)), rng.choice((50.0, 1e4))
    scaling, _ = _scaling(rng, kind, dim)
    four: Values = {"rope_theta": theta, "rope_local_base_freq": local}
    if scaling:
        four["rope_scaling"] = {"rope_type": kind, **scaling}
    full = {"rope_type": kind, "rope_theta": theta, **scaling}
    five = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}

    count = values["num_hidden_layers"]
    return values | {
        "hidden_activation": activation,
        "layer_types": [rng.choice(("full_attention", "sliding_attention")) for _ in range(count)],
        "sliding_window": rng.choice((4, 7)),
        "query_pre_attn_scalar": dim,
        "use_bidirectional_attention": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.5,
        **_by_version(four, {"rope_parameters": five}),
    }


def _gemma(rng: Random) -> Values:
    values = _decoder(rng, kinds=("default", "linear"))
    values["hidden_activation"] = values.pop("hidden_act")
    return values


def _gemma2(rng: Random) -> Values:
    values = _gemma(rng)
    return values | {"sliding_window": 5, "query_pre_attn_scalar": values["head_dim"], "attn_logit_softcapping": 20.0}


def _t5(rng: Random) -> Values:
    return {
        "d_model": rng.choice((16, 32)),
        "d_kv": rng.choice((8, 16)),
        "d_ff": rng.choice((24, 40)),
        "num_layers": rng.randint(1, 3),
        "num_heads": rng.choice((1, 2)),
        "feed_forward_proj": rng.choice(("relu", "gated-gelu")),
        "relative_attention_num_buckets": rng.choice((8, 32)),
        "pad_token_id": 0,
        "eos_token_id": 3,
        "decoder_start_token_id": 0,
    }


def _albert(rng: Random) -> Values:
    return _bert(rng) | {"embedding_size": 8}


def _deberta_v2(rng: Random) -> Values:
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm"}
    return _bert(rng) | {"type_vocab_size": 0, "position_buckets": rng.choice((-1, 4))} | relative


def _tower(rng: Random, projection: str | None = None) -> Values:
    size, heads = _heads(rng)
    values = {
        "hidden_size": size,
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "intermediate_size": rng.choice((24, 40)),
        "hidden_act": rng.choice(ACTIVATIONS),
        "layer_norm_eps": rng.choice((1e-5, 1e-6)),
    }
    return values | ({projection: 16} if projection else {})


def _clip_text(rng: Random) -> Values:
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": rng.choice((3, 2))}
    return _tower(rng, "projection_dim") | {"max_position_embeddings": POSITIONS} | ids


def _pixels(rng: Random) -> Values:
    return {"image_size": 16 * rng.choice((1, 2)), "patch_size": rng.choice((4, 8)), "num_channels": 3}


def _clip_vision(rng: Random) -> Values:
    return _tower(rng, "projection_dim") | _pixels(rng)


def _clip(rng: Random) -> Values:
    return {"text_config": _clip_text(rng), "vision_config": _clip_vision(rng), "projection_dim": rng.choice((16, 24))}


def _siglip_text(rng: Random) -> Values:
    values = _tower(rng)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return values | {"max_position_embeddings": POSITIONS, "projection_size": rng.choice((16, 24))} | ids


def _siglip_vision(rng: Random) -> Values:
    return _tower(rng) | _pixels(rng)


def _siglip2_vision(rng: Random) -> Values:
    return _tower(rng) | {"patch_size": rng.choice((4, 8)), "num_patches": rng.choice((16, 25)), "num_channels": 3}


def _dual(text: Callable[[Random], Values], vision: Callable[[Random], Values]) -> Callable[[Random], Values]:
    def configure(rng: Random) -> Values:
        values = {"text_config": text(rng), "vision_config": vision(rng)}
        values["text_config"]["projection_size"] = values["vision_config"]["hidden_size"]
        return values

    return configure


def _vit(rng: Random) -> Values:
    return _tower(rng) | _pixels(rng) | {"qkv_bias": rng.random() < 0.5}


def _vit_mae(rng: Random) -> Values:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return _vit(rng) | decoder | {"decoder_intermediate_size": 16, "mask_ratio": 0.0}


def _dinov2(rng: Random) -> Values:
    values = _vit(rng)
    del values["intermediate_size"]
    gated = rng.random() < 0.5
    return values | {"mlp_ratio": rng.choice((2, 4)), "use_swiglu_ffn": gated, "layerscale_value": 0.7}


def _dinov2_with_registers(rng: Random) -> Values:
    return _dinov2(rng) | {"num_register_tokens": rng.choice((1, 4))}


def _dinov3(rng: Random) -> Values:
    heads = rng.choice((1, 2))
    values = _vit(rng) | {"hidden_size": heads * 16, "num_attention_heads": heads}
    del values["qkv_bias"]
    biases = {f"{name}_bias": rng.random() < 0.5 for name in ("query", "key", "value", "proj", "mlp")}
    theta = rng.choice((10.0, 100.0))
    return (
        values
        | biases
        | {
            "use_gated_mlp": rng.random() < 0.5,
            "num_register_tokens": rng.choice((0, 4)),
            "layerscale_value": 0.7,
            **_by_version({"rope_theta": theta}, {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}),
        }
    )


def _swin(rng: Random) -> Values:
    return {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, rng.randint(1, 2)],
        "num_heads": [2, 4],
        "window_size": 4,
        "hidden_act": rng.choice(("gelu", "relu")),
    }


TEXT: Final = frozenset({"text"})
IMAGE: Final = frozenset({"image"})
BOTH: Final = TEXT | IMAGE

_CLIP_IMAGES: Final = ("CLIPImageProcessor",)
_SIGLIP_IMAGES: Final = ("SiglipImageProcessor",)
_VIT_IMAGES: Final = ("ViTImageProcessor", "BitImageProcessor")

FAMILIES: Final[dict[str, Family]] = {
    "bert": Family(_bert, TEXT, "wordpiece"),
    "roberta": Family(_roberta, TEXT, "bpe"),
    "xlm-roberta": Family(_roberta, TEXT, "unigram"),
    "camembert": Family(_roberta, TEXT, "unigram"),
    "distilbert": Family(_distilbert, TEXT, "wordpiece"),
    "mpnet": Family(_mpnet, TEXT, "wordpiece"),
    "modernbert": Family(_modernbert, TEXT, "bpe"),
    "clip": Family(_clip, BOTH, "bpe", _CLIP_IMAGES),
    "siglip": Family(_dual(_siglip_text, _siglip_vision), BOTH, "unigram", _SIGLIP_IMAGES),
    "siglip_text_model": Family(_siglip_text, TEXT, "unigram", kls="SiglipTextModel"),
    "siglip_vision_model": Family(_siglip_vision, IMAGE, None, _SIGLIP_IMAGES),
    "siglip2": Family(_dual(_siglip_text, _siglip2_vision), BOTH, "bpe", ("Siglip2ImageProcessor",)),
    "siglip2_text_model": Family(_siglip_text, TEXT, "bpe", kls="Siglip2TextModel"),
    "siglip2_vision_model": Family(_siglip2_vision, IMAGE, None, ("Siglip2ImageProcessor",)),
    "vit": Family(_vit, IMAGE, None, _VIT_IMAGES),
    "vit_mae": Family(_vit_mae, IMAGE, None, _VIT_IMAGES),
    "dinov2": Family(_dinov2, IMAGE, None, _VIT_IMAGES),
    "dinov2_with_registers": Family(_dinov2_with_registers, IMAGE, None, _VIT_IMAGES),
    "dinov3_vit": Family(_dinov3, IMAGE, None, ("DINOv3ViTImageProcessor",)),
    "clip_text_model": Family(_clip_text, TEXT, "bpe"),
    "clip_vision_model": Family(_clip_vision, IMAGE, None, _CLIP_IMAGES),
    "albert": Family(_albert, TEXT, "unigram"),
    "deberta-v2": Family(_deberta_v2, TEXT, "unigram"),
    "gemma": Family(_gemma, TEXT, "bpe"),
    "gemma2": Family(_gemma2, TEXT, "bpe"),
    "gemma3_text": Family(_gemma3, TEXT, "bpe"),
    "gpt_neox": Family(_gpt_neox, TEXT, "bpe"),
    "llama": Family(_llama, TEXT, "bpe"),
    "mistral": Family(_mistral, TEXT, "bpe"),
    "olmo2": Family(_olmo2, TEXT, "bpe"),
    "phi3": Family(_phi3, TEXT, "bpe"),
    "qwen2": Family(_qwen2, TEXT, "bpe"),
    "qwen3": Family(_qwen3, TEXT, "bpe"),
    "stablelm": Family(_stablelm, TEXT, "bpe"),
    "swin": Family(_swin, IMAGE, None, _VIT_IMAGES),
    "t5": Family(_t5, TEXT, "unigram", kls="T5EncoderModel"),
}
"""By ``model_type``."""

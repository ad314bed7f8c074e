"""Small random models of open_clip, and folders of them."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import open_clip
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import Tensor
from torch.nn import Module
from transformers import CLIPTokenizerFast

from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch

VOCAB = 60

MODES = ("RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16")

SIZES = ((8, 8), (31, 17), (9, 40), (64, 13), (7, 7), (100, 33))

logging.getLogger("timm").setLevel(logging.ERROR)  # it misses pretrained weights of our test model

ACTIVATIONS = (None, {"approximate": "tanh"}, {"approximate": "none"}, {})


@st.composite
def towers(draw: st.DrawFn, quick_gelu: bool) -> dict[str, Any]:
    return {
        "layers": draw(st.integers(1, 3)),
        "mlp_ratio": draw(st.sampled_from((4.0, 2, 1.5, 3.7362))),
        "ls_init_value": draw(st.sampled_from((None, 0.1, 1))),
        "act_kwargs": None if quick_gelu else draw(st.sampled_from(ACTIVATIONS)),
        "norm_kwargs": draw(st.sampled_from((None, {"eps": 1e-6}, {"eps": 1e-3}))),
        "block_type": draw(st.sampled_from((None, "default", "custom"))),
    }


@st.composite
def text_cfgs(draw: st.DrawFn, quick_gelu: bool = False) -> dict[str, Any]:
    heads = draw(st.sampled_from((1, 2, 4)))
    return draw(towers(quick_gelu)) | {
        "width": heads * draw(st.sampled_from((4, 8, 12))),
        "heads": heads,
        "context_length": draw(st.integers(8, 12)),
        "vocab_size": VOCAB,
        "no_causal_mask": draw(st.booleans()),
        "pool_type": draw(st.sampled_from(("argmax", "eos", "first", "last"))),
        "eos_id": draw(st.sampled_from((2, 50))),
        "proj_bias": draw(st.booleans()),
    }


@st.composite
def model_cfgs(draw: st.DrawFn) -> dict[str, Any]:
    """``model_cfg`` with every option that is supported."""
    quick_gelu = draw(st.booleans())
    heads, head_width = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((4, 8, 12)))
    patch = draw(st.one_of(st.integers(2, 6), st.lists(st.integers(2, 5), min_size=2, max_size=2)))
    image = draw(st.one_of(st.integers(6, 17), st.lists(st.integers(6, 17), min_size=2, max_size=2)))
    vision = draw(towers(quick_gelu)) | {
        "width": heads * head_width,
        "head_width": head_width,
        "patch_size": patch,
        "image_size": image,
        "patch_dropout": draw(st.sampled_from((0.0, 0.5))),
        "no_ln_pre": draw(st.booleans()),
        "pool_type": draw(st.sampled_from(("tok", "avg"))),
        "final_ln_after_pool": draw(st.booleans()),
    }
    cfg = {
        "embed_dim": draw(st.integers(3, 24)),
        "quick_gelu": quick_gelu,
        "custom_text": draw(st.booleans()),
        "nonscalar_logit_scale": draw(st.booleans()),
        "init_logit_scale": draw(st.sampled_from((2.6592, 1.0))),
        "vision_cfg": vision,
        "text_cfg": draw(text_cfgs(quick_gelu)),
    }
    if draw(st.booleans()):
        cfg["init_logit_bias"] = draw(st.sampled_from((-10, 0.5)))
    return cfg


def small_cfg(**text: Any) -> dict[str, Any]:
    """The ``model_cfg`` of a small model whose architecture transformers has, too."""
    text_cfg = {"width": 16, "heads": 2, "layers": 2, "context_length": 12, "vocab_size": VOCAB} | text
    vision_cfg = {"width": 16, "head_width": 8, "layers": 2, "image_size": 8, "patch_size": 4}
    return {"embed_dim": 8, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


TINY_TIMM = "vit_test_patch4_siglip_16"

timm_options: dict[str, Any] = {}
"""What timm makes of the name ``TINY_TIMM``."""


@register_model
def vit_test_patch4_siglip_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    options = {"class_token": False, "global_pool": "map", **timm_options, **kwargs}
    return _create_vision_transformer(TINY_TIMM, pretrained=False, **options)


@st.composite
def siglip_cfgs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """``model_cfg``, the options of timm's tower, and the fields of ours."""
    heads, patch = draw(st.sampled_from((1, 2, 4))), draw(st.integers(2, 5))
    width, image = heads * draw(st.sampled_from((4, 8))), draw(st.integers(patch, 17))
    depth, ratio, is_tanh = draw(st.integers(1, 3)), draw(st.sampled_from((4.0, 3.7362, 1.5))), draw(st.booleans())
    options = {
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio,
        "patch_size": patch,
        "img_size": image,
        "act_layer": "gelu_tanh" if is_tanh else "gelu",
    }
    fields = {
        "model_dim": width,
        "num_layers": depth,
        "num_attn_heads": heads,
        "ffn_inner_dim": int(width * ratio),
        "patch_size": patch,
        "image_size": image,
        "activation": "gelu_pytorch_tanh" if is_tanh else "gelu",
    }
    quick_gelu = draw(st.booleans())
    text = draw(text_cfgs(quick_gelu)) | {
        "no_causal_mask": True,
        "pool_type": "last",
        "proj_bias": True,
        "ls_init_value": None,
        "pad_id": draw(st.sampled_from((0, 1))),
    }
    cfg = {
        "embed_dim": width,
        "quick_gelu": quick_gelu,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": siglip_vision_cfg(image),
        "text_cfg": text,
    }
    return cfg, options, fields


def siglip_vision_cfg(image_size: int) -> dict[str, Any]:
    return {
        "timm_model_name": TINY_TIMM,
        "timm_model_pretrained": False,
        "image_size": image_size,
        "timm_pool": "map",
        "timm_proj": "none",
    }


def create_reference(model_cfg: dict[str, Any], seed: int = 0) -> Module:
    """open_clip's model with random weights everywhere."""
    torch.manual_seed(seed)
    cfg = deepcopy(model_cfg)
    kls = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
    model: Module = kls(**cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def create_texts(text_cfg: dict[str, Any], num: int = 5) -> tuple[Tensor, Tensor]:
    """Ids and mask: texts of several lengths with an end token, as open_clip pads them."""
    length, pad = text_cfg["context_length"], text_cfg.get("pad_id", 0)
    end = text_cfg.get("eos_id", 2) if text_cfg.get("pool_type") == "eos" else VOCAB - 1
    ids = torch.full((num, length), pad)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(num):
        size = int(torch.randint(2, length, ()))
        ids[row, :size] = torch.randint(3, 50, (size,))
        ids[row, size] = end
        mask[row, : size + 1] = True
    return ids, mask


@cache
def create_tokenizer() -> CLIPTokenizerFast:
    """CLIP's tokenizer, with the vocabulary that open_clip brings along."""
    own = open_clip.tokenizer.SimpleTokenizer()
    vocab = dict(own.encoder)
    vocab["<|startoftext|>"] = vocab.pop("<start_of_text>")
    vocab["<|endoftext|>"] = vocab.pop("<end_of_text>")
    merges = [f"{a} {b}" for a, b in own.bpe_ranks]
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.joinpath("vocab.json").write_text(json.dumps(vocab))
        folder.joinpath("merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
        return CLIPTokenizerFast.from_pretrained(folder)


def write_folder(
    folder: Path, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any] | None = None, *, tokenizer: Any = None
) -> Module:
    """Write a folder of open_clip with random weights; return the model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = create_reference(model_cfg)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg or {}}
    folder.joinpath("open_clip_config.json").write_text(json.dumps(content))
    (tokenizer or create_tokenizer()).save_pretrained(folder)
    return model


def create_image(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (size[1], size[0]), dtype=np.uint16))
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8), "RGBA")
    if mode == "P":
        return image.convert("RGB").quantize(16)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def image_size(model_cfg: dict[str, Any]) -> tuple[int, int]:
    size = model_cfg["vision_cfg"]["image_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def assert_same_embeddings(
    reference: Any, model: EmbeddingModel, model_cfg: dict[str, Any], *, masked: bool = True
) -> None:
    ids, mask = create_texts(model_cfg["text_cfg"])
    pixels = torch.randn(3, 3, *image_size(model_cfg))
    with torch.no_grad():
        texts, images = reference.encode_text(ids), reference.encode_image(pixels)
        assert difference(model(EncoderBatch.of_text(ids)).values, texts) <= 1e-5
        if masked:
            assert difference(model(EncoderBatch.of_text(ids, mask)).values, texts) <= 1e-5
            # As short as our own batches are.
            width = int(mask.sum(1).max())
            assert difference(model(EncoderBatch.of_text(ids[:, :width], mask[:, :width])).values, texts) <= 1e-5
        output = model(EncoderBatch.of_images(pixels))
    assert difference(output.values, images) <= 1e-5
    assert output.logit_scale is not None
    assert output.logit_scale.shape == (1,)
    assert output.logit_scale.item() == reference.logit_scale.item()
    assert (output.logit_bias is None) == (reference.logit_bias is None)
    if output.logit_bias is not None:
        assert output.logit_bias.item() == reference.logit_bias.item()


def assert_equal_tensors(actual: dict[str, object], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        value = actual[key]
        assert isinstance(value, Tensor)
        assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(value, tensor), key


def with_vision(**options: Any) -> dict[str, Any]:
    return {"vision_cfg": small_cfg()["vision_cfg"] | options}


def with_text(**options: Any) -> dict[str, Any]:
    return {"text_cfg": small_cfg()["text_cfg"] | options}

"""Small SigLIP models with random weights, transformers' and ours."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from hypothesis import strategies as st
from torch import Tensor

from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.models.siglip import (
    SiglipCheckpointFormat,
    SiglipConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    create_siglip_model,
)
from vembed_fs2.models.siglip import SiglipModel as Model

FORMAT = SiglipCheckpointFormat()

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "quick_gelu", "gelu_fast", "relu", "silu", "mish", "tanh")

VOCAB = 60

GENERATIONS = ("siglip", "siglip2")


@st.composite
def towers(draw: st.DrawFn, dim: int, num_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "intermediate_size": draw(st.integers(4, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_heads,
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "layer_norm_eps": draw(st.sampled_from((1e-6, 1e-5, 1e-3))),
        "attention_dropout": draw(st.sampled_from((0.0, 0.3))),
    }


@st.composite
def text_configs(draw: st.DrawFn, projection: int | None) -> dict[str, Any]:
    num_heads = draw(st.sampled_from((1, 2, 4)))
    dim = num_heads * draw(st.sampled_from((4, 8, 12)))
    return draw(towers(dim, num_heads)) | {
        "vocab_size": VOCAB,
        "max_position_embeddings": draw(st.integers(5, 16)),
        "projection_size": projection or draw(st.sampled_from((None, 7))),
        "pad_token_id": draw(st.sampled_from((0, 1, 5))),
        "bos_token_id": draw(st.sampled_from((None, 49))),
        "eos_token_id": draw(st.sampled_from((1, 50))),
    }


@st.composite
def vision_configs(draw: st.DrawFn, generation: str) -> dict[str, Any]:
    num_heads = draw(st.sampled_from((1, 2, 4)))
    dim = num_heads * draw(st.sampled_from((4, 8, 12)))
    patch = draw(st.integers(2, 6))
    own = {"image_size": draw(st.integers(patch, 4 * patch + 1))}
    if generation == "siglip2":
        own = {"num_patches": draw(st.sampled_from((1, 4, 9, 16)))}
    return draw(towers(dim, num_heads)) | own | {"num_channels": draw(st.integers(1, 4)), "patch_size": patch}


@st.composite
def hf_configs(draw: st.DrawFn, generation: str) -> dict[str, Any]:
    vision = draw(vision_configs(generation))
    text = draw(text_configs(vision["hidden_size"]))
    return {"model_type": generation, "text_config": text, "vision_config": vision}


def class_of(hf_config: dict[str, Any], suffix: str) -> Any:
    name = "".join(word.capitalize() for word in hf_config["model_type"].removesuffix("_model").split("_"))
    return getattr(transformers, name + suffix)


def create_pair(hf_config: dict[str, Any], seed: int = 0) -> tuple[Any, Model, SiglipConfig]:
    """transformers' model with random weights everywhere, and ours with the same."""
    torch.manual_seed(seed)
    reference = class_of(hf_config, "Model")(class_of(hf_config, "Config")(**hf_config)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.2)
    config = FORMAT.from_hf_config(reference.config.to_dict())
    model = create_siglip_model(config).eval()
    model.load_state_dict(FORMAT.from_hf_state_dict(dict(reference.state_dict()), config))
    return reference, model, config


def export_config(config: SiglipConfig) -> Any:
    exported = FORMAT.to_hg_config(config)
    hf_config = getattr(transformers, exported.kls_name)()
    for name, value in exported.data.items():
        setattr(hf_config, name, value)
    return hf_config


def create_texts(config: SiglipTextConfig | None, num: int = 5) -> tuple[Tensor, Tensor]:
    """Ids and mask: texts of several lengths, padded to the longest there can be."""
    assert config is not None
    mask = torch.arange(config.max_seq_len)[None] < torch.randint(2, config.max_seq_len + 1, (num, 1))
    ids = torch.randint(6, VOCAB, mask.shape)
    return ids.masked_fill(~mask, config.pad_idx or 0), mask


def create_images(config: SiglipVisionConfig | None, num: int = 3) -> Tensor:
    assert config is not None
    return torch.randn(num, config.num_channels, config.image_size, config.image_size)


def create_patches(config: SiglipVisionConfig | None, shapes: list[tuple[int, int]], extra: int = 0) -> EncoderBatch:
    """Images of the given rows and columns of patches; what is padding holds noise, too."""
    assert config is not None
    lengths = torch.tensor([h * w for h, w in shapes])
    width = int(lengths.max()) + extra
    pixels = torch.randn(len(shapes), width, config.num_channels * config.patch_size**2)
    return EncoderBatch.of_patches(pixels, torch.arange(width) < lengths[:, None], torch.tensor(shapes))


def image_features(reference: Any, batch: EncoderBatch) -> Tensor:
    features: Tensor = reference.get_image_features(**padded_patches(batch))
    return features


def padded_patches(batch: EncoderBatch) -> dict[str, Tensor]:
    """The images of a batch as transformers takes them."""
    assert batch.images is not None
    assert batch.images.grids is not None
    pixels, mask = batch.images.pad_patches()
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": batch.images.grids[:, 1:]}


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def small_config(generation: str = "siglip", **tower: Any) -> dict[str, Any]:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | tower
    text = tower | {"vocab_size": VOCAB, "max_position_embeddings": 12}
    vision = tower | {"patch_size": 4} | ({"image_size": 8} if generation == "siglip" else {"num_patches": 9})
    return {"model_type": generation, "text_config": text, "vision_config": vision}


def _assert_same_values(a: dict[str, Any], b: dict[str, Any]) -> None:
    loading = {"architectures", "dtype", "torch_dtype", "transformers_version"}
    for key in (a.keys() | b.keys()) - loading:
        if isinstance(b[key], dict) and key.endswith("_config"):
            _assert_same_values(a[key], b[key])
        else:
            assert a[key] == b[key], key


def assert_round_trip(reference: Any, config: SiglipConfig, dtype: torch.dtype) -> None:
    state = dict(reference.to(dtype).state_dict())
    ours = FORMAT.from_hf_state_dict(dict(state), config)
    assert ours.keys() == create_siglip_model(config).state_dict().keys()
    back = FORMAT.to_hg_state_dict(dict(ours), config)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        value = back[key]
        assert isinstance(value, Tensor)
        assert value.dtype == tensor.dtype
        assert torch.equal(value, tensor), key
    exported = FORMAT.to_hg_config(config)
    assert exported.kls_name == type(reference.config).__name__
    assert exported.arch == type(reference).__name__
    _assert_same_values(export_config(config).to_dict(), reference.config.to_dict())

from __future__ import annotations

from typing import Any, Final

from vembed_fs2.embedding.head import ImageHeadConfig
from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.models.auto import AutoModelConfig

from ..families import Case
from ..steps import images, texts

_TEXT: Final[dict[str, Any]] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}

_IMAGE: Final[dict[str, Any]] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}

_DUAL: Final[dict[str, Any]] = {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 12}

_RESNET: Final[dict[str, Any]] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}

_SWIN: Final[dict[str, Any]] = {
    "image_size": 8,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 2,
    "drop_path_rate": 0.2,
    "hidden_dropout_prob": 0.1,
}


def text(model_type: str, pooling: Any = "mean", **options: Any) -> Case:
    hf_config = {**_TEXT, "model_type": model_type, **options}
    config = AutoModelConfig(hf_config=hf_config, head=HeadConfig(pooling=pooling))
    return Case("vembed_auto", config, texts, texts, tensor_parallel=False)


def image(model_type: str, pooling: Any, **options: Any) -> Case:
    config = AutoModelConfig(
        hf_config={"model_type": model_type, **options}, image_head=ImageHeadConfig(pooling=pooling)
    )
    return Case("vembed_auto", config, images, images, tensor_parallel=False)


CASES = {
    "encoder": text("electra", embedding_size=8),
    "shared layers": text("albert", embedding_size=8),
    "relative positions": text("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0),
    "decoder": text("qwen2", "last", num_key_value_heads=1, attention_dropout=0.1, use_cache=True),
    "a vector per token": text("roformer", "none"),
    "image encoder": image("beit", "mean", **_IMAGE, hidden_dropout_prob=0.1, use_relative_position_bias=True),
    "shifted windows": image("swin", "pooler", **_SWIN),
    "convolutions": image("resnet", "pooler", **_RESNET),
    "texts to images": Case(
        "vembed_auto",
        AutoModelConfig(hf_config={"model_type": "chinese_clip", **_DUAL}),
        texts,
        images,
        tensor_parallel=False,
    ),
}

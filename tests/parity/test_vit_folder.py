"""Vision Transformers are read from, and written to, folders with their image processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor

from tests.parity.test_image_processor import IMAGES
from tests.parity.test_vit import MODELS, small, their_output
from vembed_fs2 import Embedder, load_model
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.files import write_json
from vembed_fs2.formats.folder import IMAGE_HEAD_FILE
from vembed_fs2.models.vit import VitModel
from vembed_fs2.processing.image import ImageProcessor

PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "resample": 2},
    "vit_mae": {"feature_extractor_type": "ViTFeatureExtractor", "size": 8},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 10}, "crop_size": 8},
    "dinov2_with_registers": {"image_processor_type": "BitImageProcessor", "size": 9, "crop_size": 8},
    "dinov3_vit": {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 8, "width": 8}},
}

# Without those whose height transformers takes for channels.
SOUND = sorted(IMAGES.keys() - {"one_high", "one_wide", "three_high", "one_pixel"})


def write_folder(model_type: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[model_type])(AutoConfig.for_model(**small(model_type))).eval()
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PROCESSORS[model_type])
    return model


def photos() -> list[Image.Image]:
    return [IMAGES[name] for name in ("china", "flower", "odd", "exact")]


@pytest.mark.parametrize("model_type", MODELS)
def test_folder_of_transformers(model_type: str, tmp_path: Path) -> None:
    if model_type == "dinov3_vit":
        pytest.importorskip("torchvision")
    reference = write_folder(model_type, tmp_path)
    embedder = Embedder.load(tmp_path, device="cpu")
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=model_type == "dinov3_vit")
    images = [image.convert("RGB") for image in photos()]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = their_output(reference, pixels).last_hidden_state
    pooled = states[:, 1:].mean(1) if model_type == "vit_mae" else states[:, 0]
    np.testing.assert_allclose(embedder.encode(photos()), normalize(pooled, dim=-1).numpy(), rtol=0, atol=1e-5)
    assert isinstance(load_model(tmp_path), VitModel)


@pytest.mark.parametrize(
    "head", [{"pooling": "cls_mean", "normalize": False}, {"pooling": "none", "top_k": 3}, {"pooling": "gem"}]
)
@pytest.mark.parametrize("model_type", MODELS)
def test_export_keeps_the_pooling(model_type: str, head: dict[str, Any], tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    reference = write_folder(model_type, source)
    write_json(source / IMAGE_HEAD_FILE, head)
    embedder = Embedder.load(source, device="cpu")
    embedder.save_hf(copy)
    again = Embedder.load(copy, device="cpu")
    assert again.source.config == embedder.source.config
    for found, expected in zip(again.encode(photos()), embedder.encode(photos())):
        np.testing.assert_array_equal(found, expected)
    loaded, info = type(reference).from_pretrained(copy, output_loading_info=True)
    assert not any(info.values())
    for key, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with pytest.raises(VembedError, match="sentence-transformers"):
        embedder.save_sentence_transformers(tmp_path / "st")


@pytest.mark.parametrize(
    ("content", "error"),
    [({"pool": "cls"}, "not valid"), ({"pooling": "pooler"}, "has none"), ({"pooling": "most"}, "must be one of")],
)
def test_broken_pooling_files_are_errors(content: dict[str, Any], error: str, tmp_path: Path) -> None:
    write_folder("dinov2", tmp_path)
    write_json(tmp_path / IMAGE_HEAD_FILE, content)
    with pytest.raises(VembedError, match=error):
        load_model(tmp_path)


FLOAT_CONFIGS: dict[str, dict[str, Any]] = {
    "published": {"size": {"height": 32, "width": 32}, "do_center_crop": None, "do_convert_rgb": None, "resample": 2},
    "defaults": {},
    "bicubic": {"size": {"height": 20, "width": 31}, "resample": 3},
    "nearest": {"size": 24, "resample": 0},
    "cropped": {"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 24, "width": 28}},
    "crop pads": {"size": 16, "do_center_crop": True, "crop_size": 21},
    "not resized": {"do_resize": False, "do_center_crop": True, "crop_size": 40},
    "not normalised": {"size": 18, "do_normalize": False, "rescale_factor": 0.01},
    "own mean": {"size": 18, "image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]},
}


@pytest.mark.parametrize("name", FLOAT_CONFIGS)
def test_pixels_of_dinov3_equal_transformers(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    reference = transformers.DINOv3ViTImageProcessorFast.from_dict(FLOAT_CONFIGS[name])
    write_json(tmp_path / "preprocessor_config.json", json.loads(reference.to_json_string()) | FLOAT_CONFIGS[name])
    processor = ImageProcessor.load(tmp_path)
    for kind in SOUND:
        image = IMAGES[kind]
        expected = reference(image.convert("RGB"), return_tensors="pt")["pixel_values"]
        pixels = processor([image])
        assert pixels.dtype == torch.float32
        assert pixels.shape == expected.shape
        assert float((pixels - expected).abs().max()) <= 1e-6, kind


def test_dinov3_processor_is_saved_and_found_by_the_type_of_the_model(tmp_path: Path) -> None:
    write_json(tmp_path / "preprocessor_config.json", {"size": 12})
    write_json(tmp_path / "config.json", {"model_type": "dinov3_vit"})
    processor = ImageProcessor.load(tmp_path)
    assert processor.size == (12, 12)
    copy = tmp_path / "copy"
    copy.mkdir()
    processor.save(copy)
    assert torch.equal(ImageProcessor.load(copy)([IMAGES["odd"]]), processor([IMAGES["odd"]]))
    assert json.loads(copy.joinpath("preprocessor_config.json").read_text())["image_processor_type"] == (
        "DINOv3ViTImageProcessorFast"
    )


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"do_rescale": False}, "do_rescale"),
        ({"resample": 1}, "resample"),
        ({"size": {"longest_edge": 8}}, "size"),
        ({"do_center_crop": True}, "crop_size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size"),
    ],
)
def test_unsupported_options_of_dinov3_are_refused(config: dict[str, Any], error: str, tmp_path: Path) -> None:
    write_json(tmp_path / "preprocessor_config.json", config | {"image_processor_type": "DINOv3ViTImageProcessor"})
    with pytest.raises(ModelLoadError, match=f"`{error}`"):
        ImageProcessor.load(tmp_path)

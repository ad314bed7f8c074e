"""Pixel values equal those of transformers' image processors."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from vembed_fs2.data.decode import decode_image
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.processing.image import ImageProcessor

CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32},
    "clip_fast": {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 24}, "crop_size": 24},
    "clip_old_name": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 40, "crop_size": 36, "resample": 3},
    "clip_bilinear": {"image_processor_type": "CLIPImageProcessor", "size": 33, "crop_size": 30, "resample": 2},
    "clip_lanczos": {"image_processor_type": "CLIPImageProcessor", "size": 33, "crop_size": 32, "resample": 1},
    "clip_crop_pads": {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 31},
    "clip_wide_crop": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 20, "width": 31},
    },
    "clip_exact": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": 28, "width": 36},
        "do_center_crop": False,
    },
    "clip_no_rescale": {
        "image_processor_type": "CLIPImageProcessor",
        "size": 32,
        "crop_size": 32,
        "do_rescale": False,
        "image_mean": [127.5, 120.0, 110.0],
        "image_std": [60.0, 61.0, 62.0],
    },
    "clip_no_normalize": {
        "image_processor_type": "CLIPImageProcessor",
        "size": 32,
        "crop_size": 32,
        "do_normalize": False,
        "rescale_factor": 0.01,
    },
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "vit_old_size": {"feature_extractor_type": "ViTFeatureExtractor", "size": 30, "image_mean": [0.1, 0.2, 0.3]},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}},
    "bit": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32},
    "convnext": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875},
}

CLASSES = {
    "clip": CLIPImageProcessor,
    "vit": ViTImageProcessor,
    "siglip": SiglipImageProcessor,
    "bit": BitImageProcessor,
    "convnext": ConvNextImageProcessor,
}

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze())


def encoded(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """``image`` as it comes back from a file."""
    file = BytesIO()
    image.save(file, kind, **options)
    return decode_image(file.getvalue())


def create_images() -> dict[str, Image.Image]:
    photos = [Image.fromarray(a) for a in load_sample_images().images]
    photo = photos[0].resize((160, 107))
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    palette = photo.quantize(64)
    grey16 = Image.fromarray(RANDOM.integers(0, 1 << 16, (40, 50), dtype=np.uint16))
    images = {
        "china": photos[0],
        "flower": photos[1],
        "jpeg": encoded(photos[1], "jpeg", quality=80),
        "grey": photo.convert("L"),
        "LA": alpha.convert("LA"),
        "RGBA": encoded(alpha, "png"),
        "palette": encoded(palette, "png"),
        "palette_transparent": encoded(palette, "png", transparency=3),
        "palette_bytes_transparent": encoded(palette, "png", transparency=bytes(range(64))),
        "PA": palette.convert("PA"),
        "cmyk_jpeg": encoded(photo.convert("CMYK"), "jpeg"),
        "YCbCr": photo.convert("YCbCr"),
        "1bit": encoded(photo.convert("1"), "png"),
        "16bit": encoded(grey16, "png"),
        "int": photo.convert("I"),
        "float": photo.convert("F"),
        "one_pixel": noise(1, 1),
        "one_wide": noise(1, 30),
        "one_high": noise(30, 1),
        "three_high": noise(40, 3),
        "strip": noise(7, 300),
        "odd": noise(53, 31),
        "exact": noise(32, 32),
    }
    assert {images[k].mode for k in ("16bit", "cmyk_jpeg", "1bit", "palette")} == {"I;16", "CMYK", "1", "P"}
    return images


IMAGES = create_images()


def write_config(folder: Path, config: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    folder.joinpath(name).write_text(json.dumps(config))
    return folder


def expected_pixels(name: str, image: Image.Image) -> Tensor:
    config = {k: v for k, v in CONFIGS[name].items() if not k.endswith("_type")}
    processor = CLASSES[name.split("_")[0]].from_dict(config)
    # One call for each image, and always channels last: transformers guesses the layout from the first image.
    rgb = image.convert("RGB")
    pixels: Tensor = processor(rgb, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_equal_transformers(name: str, tmp_path: Path) -> None:
    processor = ImageProcessor.load(write_config(tmp_path, CONFIGS[name]))
    for kind, image in IMAGES.items():
        pixels = processor([image])
        assert pixels.dtype == torch.float32
        assert pixels.shape == (1, 3, *processor.size)
        assert float((pixels - expected_pixels(name, image)).abs().max()) <= 1e-6, kind


@pytest.mark.parametrize("kind", sorted(IMAGES.keys() - {"one_high", "one_wide", "three_high", "one_pixel"}))
def test_clip_converts_as_transformers_itself_does(kind: str, tmp_path: Path) -> None:
    processor = ImageProcessor.load(write_config(tmp_path, CONFIGS["clip"]))
    reference = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    expected = reference(IMAGES[kind], return_tensors="pt")["pixel_values"]
    assert float((processor([IMAGES[kind]]) - expected).abs().max()) <= 1e-6


def test_a_batch_is_its_images(tmp_path: Path) -> None:
    processor = ImageProcessor.load(write_config(tmp_path, CONFIGS["vit"]))
    batch = processor(list(IMAGES.values()))
    for pixels, image in zip(batch, IMAGES.values()):
        assert torch.equal(pixels, processor([image])[0])
    assert processor([]).shape == (0, 3, 32, 32)


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    processor = ImageProcessor.load(write_config(tmp_path, CONFIGS["clip"]))
    expected = [processor([image]) for image in IMAGES.values()]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            results = list(pool.map(lambda image: processor([image]), IMAGES.values()))
            assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    processor = ImageProcessor.load(write_config(tmp_path, CONFIGS[name]))
    copy = tmp_path / "copy"
    copy.mkdir()
    processor.save(copy)
    images = [IMAGES["odd"]]
    assert torch.equal(ImageProcessor.load(copy)(images), processor(images))
    transformers_processor = CLASSES[name.split("_")[0]].from_pretrained(copy)
    expected = transformers_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(expected, processor(images))


def test_processor_config_and_model_type_are_used(tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    nested.mkdir()
    write_config(nested, {"image_processor": CONFIGS["siglip"]}, "processor_config.json")
    assert ImageProcessor.load(nested).size == (32, 32)
    write_config(tmp_path, {"size": 18, "crop_size": 18})
    write_config(tmp_path, {"model_type": "clip"}, "config.json")
    assert ImageProcessor.load(tmp_path).size == (18, 18)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (None, "preprocessor_config.json is missing"),
        ({"image_processor_type": "NoSuchImageProcessor"}, "NoSuchImageProcessor"),
        ({"image_processor_type": "Sam2ImageProcessorFast"}, "Sam2ImageProcessor"),
        ({"size": 224}, "None"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"longest": 3}}, "not a valid image processor"),
        ({"image_processor_type": "CLIPImageProcessor", "image_mean": [0.5, 0.5]}, "2 channels"),
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "dimensions"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(config: dict[str, Any] | None, error: str, tmp_path: Path) -> None:
    if config is not None:
        write_config(tmp_path, config)
    with pytest.raises(ModelLoadError, match=error):
        ImageProcessor.load(tmp_path)


def test_from_size() -> None:
    photo = IMAGES["china"]
    cropped = ImageProcessor.from_size(32)
    expected = CLIPImageProcessor(size=32, crop_size=32)(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(cropped([photo]), expected)
    assert ImageProcessor.from_size((20, 32)).size == (20, 32)
    stretched = ImageProcessor.from_size((20, 32), (0.5,) * 3, (0.5,) * 3, center_crop=False)
    pixels = stretched([photo])
    assert pixels.shape == (1, 3, 20, 32)
    resized = np.asarray(photo.resize((32, 20), Image.Resampling.BICUBIC)).astype(np.float32) / 127.5 - 1
    assert float((pixels[0].permute(1, 2, 0) - torch.from_numpy(resized)).abs().max()) <= 1e-6


def test_one_channel() -> None:
    processor = ImageProcessor.from_size(8, (0.5,), (0.25,))
    for image in (noise(8, 8, 1), noise(8, 8, 3)):
        pixels = processor([image])
        grey = np.asarray(image.convert("L")).astype(np.float32) / 255
        assert pixels.shape == (1, 1, 8, 8)
        assert float((pixels[0, 0] - torch.from_numpy((grey - 0.5) / 0.25)).abs().max()) <= 1e-6


def test_images_of_different_sizes_are_an_error(tmp_path: Path) -> None:
    config = CONFIGS["clip"] | {"do_center_crop": False}
    processor = ImageProcessor.load(write_config(tmp_path, config))
    assert processor([IMAGES["odd"]]).shape[2:] == (32, 54)
    with pytest.raises(DataError, match="different sizes"):
        processor([IMAGES["odd"], IMAGES["exact"]])


def test_endless_strip_is_an_error() -> None:
    with pytest.raises(DataError, match="1 x 60000 pixels is too narrow"):
        ImageProcessor.from_size(224)([Image.new("RGB", (1, 60_000))])

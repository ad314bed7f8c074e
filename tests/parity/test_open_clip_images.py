"""Images are prepared exactly as by open_clip's own transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.processing.image import ImageProcessor
from vembed_fs2.processing.open_clip import OpenClipPreprocessing, OpenClipTransform

from .open_clip_models import MODES, SIZES, create_image

PREPROCESSING = [
    {},
    {"interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    {"resize_mode": "squash", "interpolation": "bicubic"},
    {"resize_mode": "longest", "interpolation": "bilinear"},
    {"resize_mode": "longest", "fill_color": 100},
    {"interpolation": "random", "mean": 0.4, "std": None, "mode": "RGB", "size": 300},
]


@pytest.mark.parametrize("size", [8, 13, (8, 13), (13, 8)])
@pytest.mark.parametrize("options", PREPROCESSING)
def test_pixel_values_equal_open_clip(options: dict[str, Any], size: int | tuple[int, int]) -> None:
    cfg = {k: v for k, v in options.items() if v is not None} | {"size": size}
    expected = image_transform_v2(PreprocessCfg(**cfg), is_train=False)
    processor = ImageProcessor(OpenClipTransform(OpenClipPreprocessing.read(options, size)))
    assert processor.size == ((size, size) if isinstance(size, int) else size)
    for mode in MODES:
        for shape in SIZES:
            image = create_image(mode, shape)
            actual = processor([image])[0]
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected(image), rtol=0, atol=1e-6, msg=f"{mode} {shape}")


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(MODES), st.sampled_from(("shortest", "squash")))
def test_pixel_values_of_any_size_equal_open_clip(width: int, height: int, mode: str, resize_mode: str) -> None:
    expected = image_transform_v2(PreprocessCfg(size=10, resize_mode=resize_mode), is_train=False)
    processor = ImageProcessor(OpenClipTransform(OpenClipPreprocessing.read({"resize_mode": resize_mode}, 10)))
    image = create_image(mode, (width, height))
    torch.testing.assert_close(processor([image])[0], expected(image), rtol=0, atol=1e-6)


def test_a_strip_that_cannot_be_resized_is_an_error() -> None:
    processor = ImageProcessor(OpenClipTransform(OpenClipPreprocessing.read({"resize_mode": "longest"}, 8)))
    with pytest.raises(DataError, match="1000 x 1 pixels is too narrow"):
        processor([Image.new("RGB", (1000, 1))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "L"}, "`preprocess_cfg.mode` is 'L'"),
        ({"interpolation": "nearest"}, "`preprocess_cfg.interpolation` is 'nearest'"),
        ({"resize_mode": "crop"}, "`preprocess_cfg.resize_mode` is 'crop'"),
        ({"mean": [0.5]}, "`preprocess_cfg.mean`"),
        ({"fill_color": "red"}, "`preprocess_cfg.fill_color`"),
        ({"colour": 1}, "`preprocess_cfg.colour` is not an option"),
    ],
)
def test_preprocessing_that_is_not_supported_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        OpenClipPreprocessing.read(options, 8)


@pytest.mark.parametrize("options", PREPROCESSING)
def test_a_saved_image_processor_is_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    processor = ImageProcessor(OpenClipTransform(OpenClipPreprocessing.read(options, (8, 13))))
    processor.save(tmp_path)
    image = create_image("LA", (40, 31))
    assert torch.equal(ImageProcessor.load(tmp_path)([image]), processor([image]))

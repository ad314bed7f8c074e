"""Decodes images and turns them into the pixel values of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vembed_fs2.data.decode import MAX_PIXELS
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.files import read_json, write_json
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.processing.float_image import FAST_ONLY, FloatImageProcessor
from vembed_fs2.processing.open_clip import OPENAI_MEAN, OPENAI_STD, OpenClipTransform
from vembed_fs2.processing.patches import join_patches

_CONFIG_FILE: Final = "preprocessor_config.json"

_MAX_PROBE_SIDE: Final = 1024
"""Some processors keep a number of pixels where others keep a side."""

_CHANNEL_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}


@final
class ImageProcessor:
    """Turns images into pixel values, exactly as transformers' slow (Pillow) image processors do.

    Images are always converted to the number of channels that the processor
    normalises (RGB for three), also where its configuration does not ask for it
    (ViT's does not): transformers fails on grey and RGBA images there. Pillow's
    conversion drops transparency and clips 16-bit values at 255.

    Safe to call from several threads.
    """

    def __init__(self, processor: Any) -> None:
        """
        :param processor: an image processor of transformers, not one of the ``Fast`` classes;
            or :class:`~vembed_fs2.processing.open_clip.OpenClipTransform`.
        :raises ModelLoadError: it does not make pixel values of shape ``[C, H, W]``.
        """
        self._processor = processor
        mean = getattr(processor, "image_mean", None)

        self.num_channels = len(mean) if isinstance(mean, (list, tuple)) else 3
        if self.num_channels not in _CHANNEL_MODES:
            raise ModelLoadError(f"`image_mean` has {self.num_channels} channels, which is not supported.")

        flexible = "spatial_shapes" in getattr(processor, "model_input_names", ())
        self.patch_size: int | None = processor.patch_size if flexible else None
        """The size of patches that images of any size are cut into; ``None`` if all have one size."""

        # How resizing and cropping work together differs between processors: see what they make of a square.
        side = max(_sizes(getattr(processor, "size", None)).values(), default=224)
        side = min(side, _MAX_PROBE_SIDE)
        self._size = self._prepare(Image.new("RGB", (side, side))).shape[1:]

    @property
    def backend(self) -> Any:
        """What prepares images: a processor of transformers, or what stands for one."""
        return self._processor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of pixel values; of a square image if they depend on the image."""
        height, width = self._size
        return height, width

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Prepare images.

        :returns: pixel values. *Shape:* ``[P, C, H, W]``, float32.
        :raises DataError: an image is too narrow for its length, or the sizes differ where nothing crops them.
        """
        arrays = [self._prepare(image) for image in images]
        if not arrays:
            return torch.empty(0, self.num_channels, *self.size)

        if len({array.shape for array in arrays}) > 1:
            raise DataError(
                "Images have different sizes after resizing. Set `do_center_crop`, or a `size` of `height` and `width`."
            )

        return torch.from_numpy(np.stack(arrays))

    def _prepare(self, image: Image.Image) -> np.ndarray[Any, Any]:
        self._check_shape(image)

        if isinstance(self._processor, OpenClipTransform):
            return self._processor(image)

        mode = _CHANNEL_MODES[self.num_channels]

        # Pillow converts images of multiplied alpha to their plain form only.
        image = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
        array = np.asarray(image if image.mode == mode else image.convert(mode))
        if array.ndim == 2:
            array = array[:, :, np.newaxis]

        try:
            # transformers guesses the layout from the first image of a batch, and fails on images one pixel high.
            output = self._processor.preprocess([array], input_data_format="channels_last", return_tensors="np")
        except ValueError as ex:
            raise DataError(f"An image of {image.width} x {image.height} pixels cannot be prepared: {ex}.") from ex

        pixels = np.asarray(output["pixel_values"][0], dtype=np.float32)
        if self.patch_size is not None:
            pixels = join_patches(pixels, output["spatial_shapes"][0], self.patch_size)

        if pixels.ndim != 3:
            kind = type(self._processor).__name__
            raise ModelLoadError(f"{kind} makes pixel values of {pixels.ndim} dimensions, which is not supported.")

        return pixels

    def _check_shape(self, image: Image.Image) -> None:
        """A strip that is resized by its short edge can become larger than memory."""
        edge = 0
        if getattr(self._processor, "do_resize", False):
            edge = _sizes(getattr(self._processor, "size", None)).get("shortest_edge", 0)

        short, long = sorted(image.size)
        if short == 0 or edge * edge * long > MAX_PIXELS * short:
            raise DataError(f"An image of {image.width} x {image.height} pixels is too narrow to be resized.")

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json`` to ``folder``."""
        write_json(folder / _CONFIG_FILE, json.loads(self._processor.to_json_string()))

    @staticmethod
    def load(folder: Path) -> ImageProcessor:
        """Load the image processor of a Hugging Face folder.

        :raises ModelLoadError: there is none, or it is not supported.
        """
        opened = ModelFolder.maybe_open(folder)
        options = None if opened is None else opened.image_options()
        if opened is not None and options is not None:
            file, config = opened.config_file, options
        else:
            file, config = read_image_config(folder)

        if "open_clip" in config:
            try:
                return ImageProcessor(OpenClipTransform.of_saved(config["open_clip"]))
            except ModelLoadError as ex:
                raise ModelLoadError(f"{file}: {ex}") from None

        name = _class_name(folder, config)
        kls = _find_class(name) if name is not None else None
        if kls is None:
            raise ModelLoadError(f"{file} names the image processor {name}, which is not supported.")

        try:
            return ImageProcessor(kls.from_dict(config))
        except (TypeError, ValueError, LookupError, AttributeError, NotImplementedError, DataError) as ex:
            raise ModelLoadError(f"{file} is not a valid image processor: {ex}") from ex

    @staticmethod
    def from_size(
        size: int | tuple[int, int],
        mean: Sequence[float] = OPENAI_MEAN,
        std: Sequence[float] = OPENAI_STD,
        *,
        center_crop: bool = True,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
    ) -> ImageProcessor:
        """Make the image processor of a new model.

        :param size: height and width of pixel values.
        :param mean: the mean of each channel, for values in [0, 1]; one for each channel.
        :param std: the standard deviation of each channel.
        :param center_crop: if ``True``, resizes the short edge and crops the
            centre; else resizes to ``size``, whatever the aspect ratio.
        """
        from transformers import CLIPImageProcessor

        height, width = (size, size) if isinstance(size, int) else size
        exact = {"height": height, "width": width}
        processor = CLIPImageProcessor(
            size={"shortest_edge": max(height, width)} if center_crop else exact,
            crop_size=exact,
            do_center_crop=center_crop,
            image_mean=list(mean),
            image_std=list(std),
            resample=int(resample),
        )

        return ImageProcessor(processor)


def _sizes(size: object) -> dict[str, int]:
    """The numbers in a size of transformers, which is a dict or an object like one."""
    if not hasattr(size, "items"):
        return {}
    return {name: value for name, value in size.items() if isinstance(value, int)}


def read_image_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    file = folder / _CONFIG_FILE
    if file.is_file():
        return file, read_json(file)

    file = folder / "processor_config.json"
    if file.is_file():
        config = read_json(file).get("image_processor")
        if isinstance(config, dict):
            return file, config

    raise ModelLoadError(f"{folder} has no image processor: {_CONFIG_FILE} is missing.")


def _class_name(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The slow class, whether the configuration names it, its fast version, its old name or only the model."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    name = config.get("image_processor_type")
    if name is None and (old_name := config.get("feature_extractor_type")):
        name = old_name.replace("FeatureExtractor", "ImageProcessor")

    if name is None and folder.joinpath("config.json").is_file():
        model_type = read_json(folder / "config.json").get("model_type")
        # Without torchvision, transformers does not name its fast classes.
        name = FAST_ONLY.get(model_type) or IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, (None,))[0]

    return None if name is None else str(name).removesuffix("Fast")


def _find_class(name: str) -> Any:
    if name in FAST_ONLY.values():
        return FloatImageProcessor

    from transformers import BaseImageProcessor
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    kls = get_image_processor_class_from_name(name)

    # Classes that exist only as a fast version are missing here.
    return kls if isinstance(kls, type) and issubclass(kls, BaseImageProcessor) else None

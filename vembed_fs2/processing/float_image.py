"""DINOv3's image processing, which transformers has only as a "fast" one that needs torchvision.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from vembed_fs2.errors import ModelLoadError

FAST_ONLY: Final[dict[object, str]] = {"dinov3_vit": "DINOv3ViTImageProcessor"}
"""Model types with a processor of this kind, and its name without "Fast"."""

_Mode: TypeAlias = Literal["nearest-exact", "bilinear", "bicubic"]

# Pillow's numbers of filters, as far as there are such filters for tensors.
_MODES: Final[dict[object, _Mode]] = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}

_DEFAULTS: Final[dict[str, Any]] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@final
class FloatImageProcessor:
    """Does what ``DINOv3ViTImageProcessorFast`` does: it rescales first, and then resizes floating-point numbers.

    So pixels are not rounded in between, and differ from the pixels of the slow
    processors. It has the interface of transformers' processors that
    :class:`~vembed_fs2.processing.image.ImageProcessor` needs.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """
        :param config: the content of ``preprocessor_config.json``.
        :raises ModelLoadError: an option is not supported.
        """
        self._config = {**config, "image_processor_type": "DINOv3ViTImageProcessorFast"}

        values = {name: default if config.get(name) is None else config[name] for name, default in _DEFAULTS.items()}
        if not values["do_rescale"]:
            raise ModelLoadError("`do_rescale` must be true: integers cannot be normalised.")
        if values["resample"] not in _MODES:
            raise ModelLoadError(f"`resample` must be 0, 2 or 3, but is {values['resample']}, which is not supported.")

        self.do_resize = bool(values["do_resize"])

        self.size = _read_size(values["size"], "size", ("shortest_edge",))
        self.mode = _MODES[values["resample"]]
        self.crop_size: dict[str, int] | None = None
        if values["do_center_crop"]:
            self.crop_size = _read_size(values["crop_size"], "crop_size", ())

        self.rescale_factor = float(values["rescale_factor"])
        self.do_normalize = bool(values["do_normalize"])
        self.image_mean: list[float] = list(values["image_mean"])
        self.image_std: list[float] = list(values["image_std"])

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> FloatImageProcessor:
        return FloatImageProcessor(config)

    def to_json_string(self) -> str:
        return json.dumps(self._config)

    def preprocess(self, images: list[np.ndarray[Any, Any]], **_: object) -> dict[str, list[np.ndarray[Any, Any]]]:
        """Prepare images of shape ``[H, W, C]``, of bytes. *Returns:* ``pixel_values``, ``[C, H, W]`` each, float32."""
        return {"pixel_values": [self._prepare(image).numpy() for image in images]}

    def _prepare(self, image: np.ndarray[Any, Any]) -> Tensor:
        # A copy: the pixels of Pillow are read-only.
        x_CHW = torch.from_numpy(image.copy()).permute(2, 0, 1) * self.rescale_factor
        if self.do_resize:
            x_CHW = self._resize(x_CHW)
        if self.crop_size is not None:
            x_CHW = _crop(x_CHW, self.crop_size["height"], self.crop_size["width"])

        if self.do_normalize:
            mean, std = (torch.tensor(v, dtype=x_CHW.dtype)[:, None, None] for v in (self.image_mean, self.image_std))
            x_CHW = (x_CHW - mean) / std

        return x_CHW.contiguous()

    def _resize(self, x_CHW: Tensor) -> Tensor:
        height, width = x_CHW.shape[1:]
        if (edge := self.size.get("shortest_edge")) is not None:
            long = int(edge * max(height, width) / min(height, width))
            size = (edge, long) if height <= width else (long, edge)
        else:
            size = (self.size["height"], self.size["width"])

        if size == (height, width):
            return x_CHW

        x_1CHW = x_CHW.unsqueeze(0)
        if self.mode == "nearest-exact":
            return interpolate(x_1CHW, size=size, mode="nearest-exact")[0]

        return interpolate(x_1CHW, size=size, mode=self.mode, align_corners=False, antialias=True)[0]


def _read_size(size: Any, name: str, others: tuple[str, ...]) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}

    known = {"height", "width"}
    if isinstance(size, Mapping):
        sizes = {key: value for key, value in size.items() if value is not None}
        if sizes.keys() == known or (len(sizes) == 1 and sizes.keys() <= set(others)):
            return sizes

    raise ModelLoadError(f"`{name}` must hold {' or '.join(['height and width', *others])}, but is {size!r}.")


def _crop(x_CHW: Tensor, height: int, width: int) -> Tensor:
    """The centre of an image; where it is smaller, zeros surround it."""
    missing = (max(height - x_CHW.size(1), 0), max(width - x_CHW.size(2), 0))
    x_CHW = pad(x_CHW, (missing[1] // 2, (missing[1] + 1) // 2, missing[0] // 2, (missing[0] + 1) // 2))
    top, left = (x_CHW.size(1) - height) // 2, (x_CHW.size(2) - width) // 2
    return x_CHW[:, top : top + height, left : left + width]

"""Images of any size as sequences of patches (NaFlex of SigLIP 2).

Tschannen et al., "SigLIP 2: Multilingual Vision-Language Encoders with Improved
Semantic Understanding, Localization, and Dense Features", 2025,
https://arxiv.org/abs/2502.14786.

Shapes: P images, S patches, h x w patches of p x p pixels, C channels, K = p * p * C values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vembed_fs2.errors import DataError


def pack_patches(images: Sequence[Tensor], patch_size: int) -> tuple[Tensor, Tensor]:
    """Cut images into patches, row by row, one image after the other.

    :param images: pixel values of any sizes. *Shape:* ``[C, H, W]`` each.
    :returns: the patches of all images ``[sum of S, K]``, the channels of a pixel
        side by side; and how many there are over time, height and width, ``[P, 3]``.
    :raises DataError: the height or width of an image is not a multiple of ``patch_size``.
    """
    patches, grids = [], []
    for image in images:
        _, height, width = image.shape
        if height % patch_size or width % patch_size:
            raise DataError(f"Pixel values of {width} x {height} cannot be cut into patches of {patch_size} pixels.")

        grids.append((1, height // patch_size, width // patch_size))
        patches.append(_cut(image, patch_size))

    return torch.cat(patches), torch.tensor(grids)


def _cut(image_CHW: Tensor, size: int) -> Tensor:
    grid_Chwpp = image_CHW.unfold(1, size, size).unfold(2, size, size)
    return grid_Chwpp.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def join_patches(patches: np.ndarray[Any, Any], shape: Sequence[int], patch_size: int) -> np.ndarray[Any, Any]:
    """Put the patches of one image together: the reverse of :func:`pack_patches`.

    :param patches: the patches, row by row, and any padding after them. *Shape:* ``[S, K]``.
    :param shape: how many rows and columns of patches there are.
    :returns: pixel values. *Shape:* ``[C, H, W]``.
    """
    height, width = shape
    grid = patches[: height * width].reshape(height, width, patch_size, patch_size, -1)
    image: np.ndarray[Any, Any] = grid.transpose(4, 0, 2, 1, 3).reshape(-1, height * patch_size, width * patch_size)
    return image

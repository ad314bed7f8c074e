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
from torch.nn.utils.rnn import pad_sequence

from vembed_fs2.errors import DataError


def cut_patches(images: Sequence[Tensor], patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut images into patches, row by row, and pad them to the most patches.

    :param images: pixel values of any sizes. *Shape:* ``[C, H, W]`` each.
    :returns: patches ``[P, S, K]``, the channels of a pixel side by side; a mask
        ``[P, S]``, True for patches; and how many rows and columns of them each image has, ``[P, 2]``.
    :raises DataError: an image is no whole number of patches high or wide.
    """
    patches, shapes = [], []
    for image in images:
        _, height, width = image.shape
        if height % patch_size or width % patch_size:
            raise DataError(f"Pixel values of {width} x {height} cannot be cut into patches of {patch_size} pixels.")
        shapes.append((height // patch_size, width // patch_size))
        patches.append(_cut(image, patch_size))
    lengths = torch.tensor([p.size(0) for p in patches])
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    return pad_sequence(patches, batch_first=True), mask, torch.tensor(shapes)


def _cut(image_CHW: Tensor, size: int) -> Tensor:
    grid_Chwpp = image_CHW.unfold(1, size, size).unfold(2, size, size)
    return grid_Chwpp.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def join_patches(patches: np.ndarray[Any, Any], shape: Sequence[int], patch_size: int) -> np.ndarray[Any, Any]:
    """Put the patches of one image together: the reverse of :func:`cut_patches`.

    :param patches: the patches, row by row, and any padding after them. *Shape:* ``[S, K]``.
    :param shape: how many rows and columns of patches there are.
    :returns: pixel values. *Shape:* ``[C, H, W]``.
    """
    height, width = shape
    grid = patches[: height * width].reshape(height, width, patch_size, patch_size, -1)
    image: np.ndarray[Any, Any] = grid.transpose(4, 0, 2, 1, 3).reshape(-1, height * patch_size, width * patch_size)
    return image

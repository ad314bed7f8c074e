"""What image Transformers share: patches, positions, residual branches, pooling.

Shapes: P images, S prefix tokens (class, registers) and patches, M model size,
H heads, C x H x W pixels, h x w patches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, final

import torch
import torch.nn as nn
from fairseq2.device import CPU
from fairseq2.nn import BatchLayout, IncrementalStateBag, PositionEncoder, ResidualConnect
from torch import Tensor
from torch.nn import Conv2d, Module, Parameter
from torch.nn.functional import interpolate, linear
from typing_extensions import override

from vembed_fs2.dtypes import has_bfloat16_products
from vembed_fs2.models.common.attention import PaddedLayout


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width of a size that may be given as one number."""
    if isinstance(size, int):
        return size, size

    height, width = size
    return height, width


@final
class PatchProjection(Conv2d):
    """Cuts images into patches that do not overlap, and projects each. Pixels that do not fill a patch are left out."""

    def __init__(
        self,
        num_channels: int,
        model_dim: int,
        patch_size: int | tuple[int, int],
        *,
        bias: bool,
        init_fn: Callable[[Conv2d], None],
    ) -> None:
        """
        :param patch_size: height and width in pixels.
        :param init_fn: sets the initial weights.
        """
        self._init_fn = init_fn
        super().__init__(num_channels, model_dim, patch_size, stride=patch_size, bias=bias)

    @override
    def reset_parameters(self) -> None:
        self._init_fn(self)

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Project ``[P, C, H, W]`` of any data type. *Returns:* ``[P, M, h, w]``."""
        input = input.to(self.weight.dtype)

        return self._multiply(input) if self._is_slow(input) else super().forward(input)

    def _is_slow(self, x: Tensor) -> bool:
        """Whether the convolution takes twice as long as the matrix product that it is."""
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or x.device != CPU:
            return False
        # Images that are smaller than a patch are left to the convolution, which says what is wrong with them.
        fits = x.ndim == 4 and x.size(2) >= self.kernel_size[0] and x.size(3) >= self.kernel_size[1]
        return fits and x.dtype == torch.bfloat16 and has_bfloat16_products()

    def _multiply(self, x_PCHW: Tensor) -> Tensor:
        rows, columns = self.kernel_size
        height, width = x_PCHW.size(2) // rows, x_PCHW.size(3) // columns

        x_PCHW = x_PCHW[:, :, : height * rows, : width * columns]
        patches = x_PCHW.reshape(*x_PCHW.shape[:2], height, rows, width, columns).permute(0, 2, 4, 1, 3, 5)

        # [P, h, w, M] of [P, h, w, C * rows * columns].
        return linear(patches.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchLayout(PaddedLayout):  # type: ignore[misc]  # final in fairseq2
    """The layout of a batch of images of one size, with the rotation of their queries and keys.

    Layers get the rotation with it, and not from a module that they share:
    images of another size may pass before activation checkpointing computes a
    layer again.
    """

    rotation: tuple[Tensor, Tensor]
    """Cosines and sines. *Shape:* ``[S, 1, head size]`` each, float32."""

    def __init__(self, seqs: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        super().__init__(seqs, None)
        self.rotation = rotation


class PatchPositionEncoder(PositionEncoder):
    """Base of rotary encoders of patches, whose angles the layout of the batch holds (:class:`PatchLayout`)."""

    @override
    def forward(
        self, seqs: Tensor, seqs_layout: BatchLayout, *, state_bag: IncrementalStateBag | None = None
    ) -> Tensor:
        """
        :param seqs: queries or keys. *Shape:* ``[P, S, H, head size]``.
        :returns: *Shape:* the same, of the same data type.
        """
        assert isinstance(seqs_layout, PatchLayout)

        return self.rotate(seqs, *seqs_layout.rotation).type_as(seqs)

    @abstractmethod
    def rotate(self, seqs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate queries or keys. *Shape:* as ``seqs``; cosines and sines ``[S, 1, head size]``."""


@final
class LayerScale(Module):
    """Scales each dimension by a learned factor (Touvron et al., 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, model_dim: int, init: float) -> None:
        """
        :param init: the initial value of all factors.
        """
        super().__init__()
        self.gamma = Parameter(torch.empty(model_dim))
        self.init = init
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

    @override
    def extra_repr(self) -> str:
        return f"init={self.init:G}"


@final
class BranchResidual(ResidualConnect):
    """Scales a branch of a layer, drops it for some images in training, and adds it to what it branched from.

    Dropping is stochastic depth (Huang et al., 2016, https://arxiv.org/abs/1603.09382).
    """

    def __init__(self, scale: LayerScale | None = None, drop_p: float = 0.0) -> None:
        """
        :param drop_p: the probability that an image does without the branch.
        """
        super().__init__()
        self.scale: LayerScale | None
        self.register_module("scale", scale)
        self.drop_p = drop_p

    @override
    def forward(self, seqs: Tensor, residual: Tensor) -> Tensor:
        drops = self.training and self.drop_p > 0.0
        if self.scale is not None and not drops:
            return torch.addcmul(residual, seqs, self.scale.gamma)
        if self.scale is not None:
            seqs = self.scale(seqs)
        if drops:
            seqs = seqs * self._draw_factors(seqs)

        return seqs + residual

    def _draw_factors(self, seqs: Tensor) -> Tensor:
        """0 for images without the branch, and for the others what keeps the mean. *Returns:* ``[P, 1, 1]``."""
        keep_p = 1.0 - self.drop_p
        # In float32: a sum with a half-precision draw would be rounded up to a whole number too often.
        draws = torch.rand((seqs.size(0), 1, 1), device=seqs.device, dtype=torch.float32)
        return ((draws + keep_p).floor() / keep_p).to(seqs.dtype)

    @override
    def extra_repr(self) -> str:
        return f"drop_p={self.drop_p:G}"


def resize_positions(
    table_hwM: Tensor,
    height: int,
    width: int,
    *,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Interpolate a table of positions to another grid of patches, in float32.

    :param table_hwM: the positions of the grid that the model was trained on.
    :returns: *Shape:* ``[height * width, M]``, of the data type of the table; the table itself if it fits.
    """
    if table_hwM.shape[:2] == (height, width):
        return table_hwM.flatten(0, 1)

    grid_1Mhw = table_hwM.permute(2, 0, 1).unsqueeze(0).float()
    grid_1Mhw = interpolate(grid_1Mhw, size=(height, width), mode=mode, align_corners=False, antialias=antialias)
    return grid_1Mhw.squeeze(0).flatten(1).transpose(0, 1).to(table_hwM.dtype)

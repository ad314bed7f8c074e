"""Vision Transformers as embedding models.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, https://arxiv.org/abs/2010.11929;
He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, https://arxiv.org/abs/2111.06377;
Oquab et al., "DINOv2", 2023, https://arxiv.org/abs/2304.07193;
Darcet et al., "Vision Transformers Need Registers", 2023, https://arxiv.org/abs/2309.16588;
Siméoni et al., "DINOv3", 2025, https://arxiv.org/abs/2508.10104.

Shapes: P images, S class token, registers and patches, R registers, H heads,
K head size, M model size, D embedding size, C x H x W pixels, h x w patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from fairseq2.models.transformer import StandardTransformerEncoder
from fairseq2.nn import Projection
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from typing_extensions import override

from vembed_fs2.embedding.head import Head, States
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.models.common.attention import PaddedLayout
from vembed_fs2.models.common.dropout import Dropout
from vembed_fs2.models.common.vision import PatchLayout, PatchPositionEncoder, PatchProjection, resize_positions


class PatchGrid(NamedTuple):
    """How many patches an image has."""

    height: int
    width: int


@final
class PositionTable(Module):
    """A learned or fixed position for the class token and for each patch of the grid that the model was trained on."""

    def __init__(
        self, grid: PatchGrid, model_dim: int, *, fixed: bool, antialias: bool, init_fn: Callable[[PositionTable], None]
    ) -> None:
        """
        :param fixed: if ``True``, the positions are not trained.
        :param antialias: whether resizing to a smaller grid averages.
        :param init_fn: sets the initial positions.
        """
        super().__init__()
        self.weight = Parameter(torch.empty(1 + grid.height * grid.width, model_dim), requires_grad=not fixed)
        self.grid = grid
        self.fixed = fixed
        self.antialias = antialias
        self.init_fn = init_fn
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.init_fn(self)

    @override
    def forward(self, grid: PatchGrid) -> Tensor:
        """Return the positions of the class token and of a grid of patches, ``[1 + h * w, M]``."""
        # Recipes make every parameter trainable.
        table_SM = self.weight.detach() if self.fixed else self.weight
        if grid == self.grid:
            return table_SM

        patches_hwM = table_SM[1:].reshape(*self.grid, -1)
        patches_SM = resize_positions(patches_hwM, grid.height, grid.width, antialias=self.antialias)
        return torch.cat([table_SM[:1], patches_SM])

    if TYPE_CHECKING:
        __call__ = forward


@final
class VitFrontend(Module):
    """Cuts images into patches, puts class token and registers before them, and adds positions."""

    def __init__(
        self,
        patch_proj: PatchProjection,
        positions: PositionTable | None,
        *,
        num_registers: int,
        mask_token: bool,
        dropout_p: float,
        init_fn: Callable[[VitFrontend], None],
    ) -> None:
        """
        :param positions: ``None`` if attention rotates instead (:class:`PatchRotation`).
        :param mask_token: whether there is a token for the masked patches of pretraining. Kept for export.
        :param init_fn: sets the initial class token, registers and mask token.
        """
        super().__init__()
        model_dim = patch_proj.out_channels
        self.class_embed = Parameter(torch.empty(model_dim))
        self.num_prefix_tokens = 1 + num_registers
        self.registers: Parameter | None
        self.register_parameter(
            "registers", Parameter(torch.empty(num_registers, model_dim)) if num_registers else None
        )
        self.mask_embed: Parameter | None

        # Frozen: a parameter without a gradient is an error under DDP.
        mask_embed = Parameter(torch.empty(model_dim), requires_grad=False) if mask_token else None
        self.register_parameter("mask_embed", mask_embed)
        self.patch_proj = patch_proj
        self.positions: PositionTable | None
        self.register_module("positions", positions)
        self.dropout = Dropout(dropout_p)
        self.init_fn = init_fn
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.init_fn(self)

    @override
    def forward(self, x_PCHW: Tensor) -> tuple[Tensor, PatchGrid]:
        """Return the inputs of the Transformer, ``[P, S, M]``, and the grid of patches.

        :raises DataError: the images are smaller than a patch.
        """
        size, patch = x_PCHW.shape[-2:], self.patch_proj.kernel_size
        if size[0] < patch[0] or size[1] < patch[1]:
            raise DataError(
                f"Images must have at least {patch[0]} x {patch[1]} pixels, but have {size[0]} x {size[1]} instead."
            )

        x_PMhw = self.patch_proj(x_PCHW)
        grid = PatchGrid(x_PMhw.size(2), x_PMhw.size(3))
        num_images = x_PMhw.size(0)
        class_P1M = self.class_embed.expand(num_images, 1, -1)

        seqs_PSM = torch.cat([class_P1M, x_PMhw.flatten(2).transpose(1, 2)], dim=1)
        if self.positions is not None:
            seqs_PSM = seqs_PSM + self.positions(grid)

        if self.registers is not None:
            # They have no positions.
            registers_PRM = self.registers.expand(num_images, -1, -1)
            seqs_PSM = torch.cat([seqs_PSM[:, :1], registers_PRM, seqs_PSM[:, 1:]], dim=1)

        seqs_PSM = self.dropout(seqs_PSM)
        return seqs_PSM, grid

    if TYPE_CHECKING:
        __call__ = forward


def sincos_positions(grid: PatchGrid, model_dim: int, device: torch.device) -> Tensor:
    """Return MAE's fixed positions of a grid of patches, ``[h * w, M]``: half for the column, half for the row."""
    steps = torch.arange(model_dim // 4, dtype=torch.float64, device=device) / (model_dim / 4)
    frequencies = 1.0 / 10_000.0**steps
    rows, columns = (torch.arange(n, dtype=torch.float64, device=device) for n in grid)

    rows_hw, columns_hw = torch.meshgrid(rows, columns, indexing="ij")
    parts = []
    for positions in (columns_hw, rows_hw):
        angles = positions.reshape(-1, 1) * frequencies
        parts += [angles.sin(), angles.cos()]

    return torch.cat(parts, dim=1).float()


@final
class PatchRotation(Module):
    """Computes DINOv3's rotary position embeddings: half of the pairs for the row of a patch, half for its column.

    Coordinates run from -1 to 1 over the image, whatever its size. Class token
    and registers are not rotated. In training, all images of a batch are
    shifted, stretched and scaled by the same random amounts.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        num_prefix_tokens: int,
        *,
        shift: float | None = None,
        jitter: float | None = None,
        rescale: float | None = None,
    ) -> None:
        """
        :param theta: the base of the wavelengths.
        :param shift: in training, shifts rows and columns by up to this much.
        :param jitter: in training, stretches rows and columns by up to this factor.
        :param rescale: in training, scales the whole by up to this factor.
        """
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.num_prefix_tokens = num_prefix_tokens
        self.shift = shift
        self.jitter = jitter
        self.rescale = rescale

    @override
    def forward(self, grid: PatchGrid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the angles, ``[S, 1, K]`` each, float32."""
        rows_h, columns_w = (_centers(n, device) for n in grid)

        points_S2 = torch.stack(torch.meshgrid(rows_h, columns_w, indexing="ij"), dim=-1).flatten(0, 1)
        if self.training:
            points_S2 = self._augment(points_S2)

        steps = torch.arange(0, 1, 4 / self.head_dim, dtype=torch.float32, device=device)[: self.head_dim // 4]
        angles_SK = (2 * math.pi * points_S2.unsqueeze(2) * (1 / self.theta**steps)).flatten(1).tile(2)

        # An angle of zero leaves a token as it is.
        prefix_SK = angles_SK.new_zeros(self.num_prefix_tokens, self.head_dim)
        angles_S1K = torch.cat([prefix_SK, angles_SK]).unsqueeze(1)

        return angles_S1K.cos(), angles_S1K.sin()

    def _augment(self, points_S2: Tensor) -> Tensor:
        # The same draws as transformers', in the same order.
        if self.shift is not None:
            points_S2 = points_S2 + points_S2.new_empty(1, 2).uniform_(-self.shift, self.shift)

        if self.jitter is not None:
            limit = math.log(self.jitter)
            points_S2 = points_S2 * points_S2.new_empty(1, 2).uniform_(-limit, limit).exp()

        if self.rescale is not None:
            limit = math.log(self.rescale)
            points_S2 = points_S2 * points_S2.new_empty(1).uniform_(-limit, limit).exp()

        return points_S2

    if TYPE_CHECKING:
        __call__ = forward

    @override
    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, theta={self.theta:G}"


def _centers(num: int, device: torch.device) -> Tensor:
    """The centres of ``num`` equal parts of the range from -1 to 1."""
    return 2.0 * (torch.arange(0.5, num, dtype=torch.float32, device=device) / num) - 1.0


@final
class PatchRotaryEncoder(PatchPositionEncoder):
    """Rotates the halves of queries and keys."""

    @override
    def rotate(self, seqs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = seqs.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)

        return seqs * cos + turned * sin


@final
class VitModel(EmbeddingModel):
    """A Vision Transformer: unnormalised embeddings of images."""

    modalities = frozenset({"image"})

    def __init__(
        self,
        frontend: VitFrontend,
        rotation: PatchRotation | None,
        encoder: StandardTransformerEncoder,
        pooler: Projection | None,
        pooler_activation: Module,
        head: Head,
    ) -> None:
        super().__init__()
        self.frontend = frontend
        self.rotation: PatchRotation | None
        self.register_module("rotation", rotation)
        self.encoder = encoder
        self.pooler: Projection | None
        self.register_module("pooler", pooler)
        self.pooler_activation = pooler_activation
        self.head = head

    @override
    def encode_image_states(self, batch: EncoderBatch) -> States:
        seqs_PSM = self.encode_patches(batch)
        pooled = None
        if self.head.config.reads_pooler:
            assert self.pooler is not None
            pooled = self.pooler_activation(self.pooler(seqs_PSM[:, 0]))
        return States(seqs_PSM, None, pooled, self.frontend.num_prefix_tokens)

    def encode_patches(self, batch: EncoderBatch) -> Tensor:
        """Return the final states of class token, registers and patches, ``[P, S, M]``.

        :raises DataError: the images are smaller than a patch.
        """
        assert batch.images is not None

        seqs_PSM, grid = self.frontend(batch.images.values)
        layout = PaddedLayout(seqs_PSM, None)
        if self.rotation is not None:
            layout = PatchLayout(seqs_PSM, self.rotation(grid, seqs_PSM.device))
        return self.encoder(seqs_PSM, layout)

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [self.encoder.layers]

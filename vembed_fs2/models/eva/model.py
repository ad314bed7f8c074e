"""EVA-CLIP: CLIP with the image Transformer of EVA or EVA-02.

Sun et al., "EVA-CLIP: Improved Training Techniques for CLIP at Scale", 2023,
https://arxiv.org/abs/2303.15389; Fang et al., "EVA: Exploring the Limits of
Masked Visual Representation Learning at Scale", 2022,
https://arxiv.org/abs/2211.07636, and "EVA-02: A Visual Representation for Neon
Genesis", 2023, https://arxiv.org/abs/2303.11331.

Shapes: P images, S class token and patches, M model size, H attention heads,
K head size, D embedding size, C x H x W pixels, h x w patches.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, final

import torch
import torch.nn as nn
from fairseq2.models.transformer import (
    AttentionBiasCache,
    FeedForwardNetwork,
    MultiheadAttention,
    StandardTransformerEncoder,
    TransformerEncoderLayer,
)
from fairseq2.nn import (
    BatchLayout,
    LayerNorm,
    Linear,
    Projection,
    ResidualConnect,
    RowShardedLinear,
    StandardEmbedding,
)
from fairseq2.ops.tensor_parallel import gather
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import pad
from typing_extensions import override

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.head import HeadConfig, States, pool
from vembed_fs2.models.clip.model import ClipModel, VisionTower
from vembed_fs2.models.common.attention import PaddedLayout
from vembed_fs2.models.common.dropout import Dropout
from vembed_fs2.models.common.vision import PatchLayout, PatchPositionEncoder, PatchProjection, resize_positions

EvaPooling: TypeAlias = Literal["cls", "mean", "max", "mean_max"]

INIT_STD: Final = 0.02
"""The standard deviation of initial weights."""

_ROPE_THETA: Final = 10_000.0


@final
class GridRotaryEncoder(PatchPositionEncoder):
    """Rotates pairs of neighbouring elements of queries and keys, in float32."""

    @override
    def rotate(self, seqs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_PSHK = seqs.float()
        turned_PSHK = torch.stack([-x_PSHK[..., 1::2], x_PSHK[..., ::2]], dim=-1).flatten(-2)

        return x_PSHK * cos + turned_PSHK * sin


@final
class GridRotations:
    """The angles by which tokens are rotated: half of them grow with the row of a patch, half with its column.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    2021, https://arxiv.org/abs/2104.09864, in two dimensions.
    """

    def __init__(self, head_dim: int, ref_size: int | None) -> None:
        """
        :param ref_size: rows and columns are numbered as if there were this many of each.
        """
        self.head_dim = head_dim
        self.ref_size = ref_size

    def __call__(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for the class token, which is not rotated, and the patches: ``[S, 1, K]`` each."""
        num_bands = self.head_dim // 4
        bands = 1.0 / _ROPE_THETA ** (torch.arange(num_bands, device=device, dtype=torch.float32) / num_bands)
        rows = self._number(height, device)[:, None, None] * bands
        columns = self._number(width, device)[None, :, None] * bands
        shape = (height, width, num_bands)
        angles_hwK = torch.cat([rows.expand(shape), columns.expand(shape)], dim=2).repeat_interleave(2, dim=2)
        angles_S1K = pad(angles_hwK.flatten(0, 1), (0, 0, 1, 0)).unsqueeze(1)

        return angles_S1K.cos(), angles_S1K.sin()

    def _number(self, size: int, device: torch.device) -> Tensor:
        numbers = torch.arange(size, device=device, dtype=torch.float32)
        return numbers if self.ref_size is None else numbers / size * self.ref_size


@final
class NormalizedProjection(Projection):
    """Normalises its inputs, then projects them.

    With tensor parallelism each rank has a shard of the inputs; the norm needs all of them.
    """

    def __init__(self, layer_norm: LayerNorm, proj: RowShardedLinear) -> None:
        """
        :param proj: takes its shard of the inputs itself (``scatter_input``).
        """
        super().__init__(proj.input_dim, proj.output_dim)
        self.layer_norm = layer_norm
        self.proj = proj

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.proj.sharded:
            x = gather(x, self.proj.tp_gang, dim=-1)
        return self.proj(self.layer_norm(x))


@final
class PostNormLayer(TransformerEncoderLayer):
    """Normalises what attention and feed-forward network add, and not their inputs."""

    def __init__(
        self,
        self_attn: MultiheadAttention,
        self_attn_layer_norm: LayerNorm,
        ffn: FeedForwardNetwork,
        ffn_layer_norm: LayerNorm,
        *,
        self_attn_residual: ResidualConnect,
        ffn_residual: ResidualConnect,
    ) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.self_attn_layer_norm = self_attn_layer_norm
        self.self_attn_residual = self_attn_residual
        self.ffn = ffn
        self.ffn_layer_norm = ffn_layer_norm
        self.ffn_residual = ffn_residual

    @override
    def forward(self, seqs: Tensor, seqs_layout: BatchLayout, attn_bias_cache: AttentionBiasCache) -> Tensor:
        attns = self.self_attn(seqs, seqs_layout, seqs, seqs_layout, seqs, attn_bias_cache)
        seqs = self.self_attn_residual(self.self_attn_layer_norm(attns), seqs)
        return self.ffn_residual(self.ffn_layer_norm(self.ffn(seqs)), seqs)


@final
class EvaFrontend(Module):
    """Cuts images into patches, puts the class token before them and adds positions."""

    pos_embed: StandardEmbedding | None
    layer_norm: LayerNorm | None

    def __init__(
        self,
        patch_proj: PatchProjection,
        pos_embed: StandardEmbedding | None,
        layer_norm: LayerNorm | None,
        rotations: GridRotations | None,
    ) -> None:
        """
        :param pos_embed: positions of the class token and of a square of patches.
        :param layer_norm: normalises the inputs of the Transformer.
        """
        super().__init__()
        self.class_embed = Parameter(torch.empty(patch_proj.out_channels))
        self.patch_proj = patch_proj
        self.register_module("pos_embed", pos_embed)
        self.register_module("layer_norm", layer_norm)
        self.rotations = rotations
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.class_embed, std=INIT_STD)

    @override
    def forward(self, x_PCHW: Tensor) -> tuple[Tensor, BatchLayout]:
        """Return the inputs of the Transformer, ``[P, S, M]``, and their layout."""
        x_PMhw = self.patch_proj(x_PCHW)
        height, width = x_PMhw.shape[2:]
        class_P1M = self.class_embed.expand(x_PMhw.size(0), 1, -1)

        seqs_PSM = torch.cat([class_P1M, x_PMhw.flatten(2).transpose(1, 2)], dim=1)
        if self.pos_embed is not None:
            seqs_PSM = seqs_PSM + _positions(self.pos_embed.weight, height, width)
        if self.layer_norm is not None:
            seqs_PSM = self.layer_norm(seqs_PSM)
        if self.rotations is None:
            return seqs_PSM, PaddedLayout(seqs_PSM, None)

        return seqs_PSM, PatchLayout(seqs_PSM, self.rotations(height, width, seqs_PSM.device))

    if TYPE_CHECKING:
        __call__ = forward


def _positions(table_SM: Tensor, height: int, width: int) -> Tensor:
    """Positions of the class token and of a grid of patches, resized from the trained grid if that differs."""
    side = isqrt(table_SM.size(0) - 1)
    if (height, width) == (side, side):
        return table_SM

    grid_hwM = table_SM[1:].reshape(side, side, -1)
    return torch.cat([table_SM[:1], resize_positions(grid_hwM, height, width, antialias=True)])


@final
class EvaHead(Module):
    """Makes one state of many, normalises and projects it."""

    proj: Projection | None

    def __init__(
        self,
        layer_norm: LayerNorm,
        pooling: EvaPooling,
        proj: Projection | None,
        *,
        norm_after_pooling: bool = False,
        dropout_p: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_norm = layer_norm
        self.pooling: EvaPooling = pooling
        self.dropout = Dropout(dropout_p)
        self.register_module("proj", proj)
        self.norm_after_pooling = norm_after_pooling

    @override
    def forward(self, seqs_PSM: Tensor) -> Tensor:
        """Make one state of the final states of an image. *Returns:* ``[P, D]``."""
        # Only what is pooled is normalised: states do not take part in each other's norms.
        seqs_PSM = seqs_PSM[:, :1] if self.pooling == "cls" else seqs_PSM[:, 1:]
        if self.norm_after_pooling:
            x_PM = self.layer_norm(self._pool(seqs_PSM))
        else:
            x_PM = self._pool(self.layer_norm(seqs_PSM))
        return self._project(x_PM)

    def project(self, seqs_PSM: Tensor) -> Tensor:
        """Normalise and project each state. *Returns:* ``[P, S, D]``."""
        return self._project(self.layer_norm(seqs_PSM))

    def _project(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        return x if self.proj is None else self.proj(x)

    def _pool(self, seqs_PSM: Tensor) -> Tensor:
        if self.pooling == "mean_max":
            return 0.5 * (pool(seqs_PSM, None, "mean") + pool(seqs_PSM, None, "max"))
        return pool(seqs_PSM, None, self.pooling)

    if TYPE_CHECKING:
        __call__ = forward


@final
class MlpProjection(Projection):
    """A linear layer of twice the output size, GELU, and another linear layer."""

    def __init__(self, input_dim: int, output_dim: int, bias: bool, dropout_p: float) -> None:
        """
        :param bias: whether the second layer has a bias.
        """
        super().__init__(input_dim, output_dim)
        self.inner_proj = Linear(input_dim, 2 * output_dim, bias=True)
        self.activation = create_activation("gelu")
        self.dropout = Dropout(dropout_p)
        self.output_proj = Linear(2 * output_dim, output_dim, bias=bias)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.output_proj(self.dropout(self.activation(self.inner_proj(x))))


@final
class EvaVisionTower(VisionTower):
    """The image Transformer of EVA or EVA-02."""

    def __init__(self, frontend: EvaFrontend, encoder: StandardTransformerEncoder, head: EvaHead) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        self.head = head

    @override
    def forward(self, x_PCHW: Tensor, head: HeadConfig) -> States:
        seqs_PSM = self.encoder(*self.frontend(x_PCHW))
        tokens_PSD = self.head.project(seqs_PSM) if head.reads_states else None
        pooled_PD = self.head(seqs_PSM) if head.reads_pooler else None
        return States(tokens_PSD, None, pooled_PD, num_prefix_tokens=1)


@final
class EvaModel(ClipModel):
    """An EVA-CLIP model: CLIP's text Transformer beside EVA's image Transformer."""

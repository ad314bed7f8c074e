"""The vision tower of Qwen3-VL: images of any size, one after the other, without padding.

Shapes: P images, S patches of all images, U tokens of all images, C tower size, M decoder size, K values of a patch,
H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from fairseq2.device import Device
from fairseq2.models.transformer import (
    SDPA,
    AttentionBiasCache,
    IdentityBias,
    TorchSDPA,
    create_default_sdpa,
    get_default_sdpa_factory,
)
from fairseq2.nn import BatchLayout, ColumnShardedLinear, LayerNorm, Linear, RowShardedLinear, StandardEmbedding
from torch import Tensor
from torch.nn import Module, ModuleList
from typing_extensions import override

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.fairseq2_seams import OpenBatchLayout
from vembed_fs2.models.common.attention import EncoderSDPA, attend
from vembed_fs2.models.common.rotary import create_frequencies


class PackedPatchLayout(OpenBatchLayout):  # type: ignore[misc]  # final in fairseq2
    """The layout of images that stand one after the other. A patch attends to those of its own image, or frame."""

    rotations: Sequence[Tensor]
    """Cosines and sines. *Shape:* ``[2, S, 1, D / 2]``."""

    groups: Sequence[tuple[int, Tensor | None]]
    """The lengths that there are, with the patches of the images of each; ``None`` means all patches."""

    def __init__(self, grids: Tensor, rotation: Tensor, device: Device) -> None:
        """
        :param grids: the patches over time, height and width. *Shape:* ``[P, 3]``, on the CPU.
        """
        lengths = (grids[:, 1] * grids[:, 2]).repeat_interleave(grids[:, 0])
        super().__init__((int(lengths.sum()),), lengths.tolist(), packed=True, device=device)
        self.rotations = [rotation]

        owner = lengths.repeat_interleave(lengths)
        kinds = sorted(set(lengths.tolist()))
        self.groups = [(kinds[0], None)] if len(kinds) == 1 else [
            (kind, (owner == kind).nonzero().squeeze(1).to(device)) for kind in kinds
        ]  # fmt: skip


@final
class PatchSDPA(EncoderSDPA):
    """Attention of each patch to the patches of its image; images of the same number of patches go together."""

    takes_packed = True

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, dropout_p: float) -> Tensor:
        assert isinstance(layout, PackedPatchLayout)

        def attend_alike(length: int, tensors: Sequence[Tensor]) -> Tensor:
            # [n * S, H, D] -> [n, S, H, D]
            q, k, v = (x.reshape(-1, length, *x.shape[1:]) for x in tensors)
            return attend(q, k, v, None, dropout_p=dropout_p).flatten(0, 1)

        if layout.groups[0][1] is None:
            return attend_alike(layout.groups[0][0], (q, k, v))

        found = [
            attend_alike(n, [x.index_select(0, idx) for x in (q, k, v)]) for n, idx in layout.groups if idx is not None
        ]
        order = torch.cat([idx for _, idx in layout.groups if idx is not None])

        return torch.zeros_like(q).index_copy(0, order, torch.cat(found))


def create_patch_sdpa() -> SDPA:
    """Create the tower's attention: :class:`PatchSDPA`, unless the user set another default in fairseq2."""
    return PatchSDPA() if get_default_sdpa_factory() is TorchSDPA else create_default_sdpa(IdentityBias())


@final
class VisionTower(Module):
    """Turns patches into tokens of the decoder.

    ::

        patches [S, K] -> linear -> + stretched position table -> layers with 2-D rotary positions
          -> merger (square of patches -> token) -> [U, M]
        states after some of the layers -> a merger of their own -> [U, M] each, added in the decoder
    """

    def __init__(
        self,
        patch_proj: Linear,
        pos_embed: StandardEmbedding,
        layers: Sequence[Module],
        merger: PatchMerger,
        deepstack_layers: Sequence[int],
        deepstack_mergers: Sequence[PatchMerger],
        *,
        head_dim: int,
        merge_size: int,
    ) -> None:
        """
        :param head_dim: the size of an attention head.
        :param merge_size: the height and width of the square of patches that become one token.
        """
        super().__init__()
        self.patch_proj = patch_proj
        self.pos_embed = pos_embed
        self.layers = ModuleList(layers)
        self.merger = merger
        self.deepstack_layers = list(deepstack_layers)
        self.deepstack_mergers = ModuleList(deepstack_mergers)
        self.head_dim = head_dim
        self.merge_size = merge_size

    @override
    def forward(self, patches: Tensor, grids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """
        :param patches: image after image; within an image, squares of ``merge_size`` x ``merge_size`` patches stand
            together. *Shape:* ``[S, K]``.
        :param grids: the patches over time, height and width. *Shape:* ``[P, 3]``, on the CPU.
        :returns: the tokens, and what is added to the states of the decoder's first layers. *Shape:* ``[U, M]`` each.
        """
        states = self.patch_proj(patches.to(self.patch_proj.weight.dtype))
        states = states + self.embed_positions(grids).to(states.dtype)

        layout = PackedPatchLayout(grids, self.create_rotation(grids, states.device), states.device)
        bias_cache = AttentionBiasCache()

        added = []
        for idx, layer in enumerate(self.layers):
            states = layer(states, layout, bias_cache)
            if idx in self.deepstack_layers:
                added.append(self.deepstack_mergers[self.deepstack_layers.index(idx)](states))

        return self.merger(states), added

    if TYPE_CHECKING:
        __call__ = forward

    def embed_positions(self, grids: Tensor) -> Tensor:
        """Stretch the position table to each image, linearly in both directions. *Shape:* ``[S, C]``."""
        table = self.pos_embed.weight
        side = int(table.size(0) ** 0.5)
        known: dict[tuple[int, int], Tensor] = {}

        found = []
        for frames, height, width in grids.tolist():
            if (height, width) not in known:
                rows, columns = (_stretch(side, size, table.device) for size in (height, width))
                # [side, side, C] -> [height, side, C] -> [height, width, C]
                square = _interpolate(table.float().view(side, side, -1), rows)
                square = _interpolate(square.transpose(0, 1), columns).transpose(0, 1)
                known[height, width] = self._in_squares(square).flatten(0, 1)
            found.append(known[height, width].repeat(frames, 1))

        return torch.cat(found)

    def create_rotation(self, grids: Tensor, device: Device) -> Tensor:
        """The cosines and sines of each patch's row and column. *Shape:* ``[2, S, 1, D / 2]``."""
        frequencies = create_frequencies(self.head_dim // 2, 10_000.0, torch.device("cpu"))

        angles = []
        for frames, height, width in grids.tolist():
            places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(height, width, 2)
            turns = self._in_squares(places).flatten(0, 1).float().unsqueeze(2) * frequencies
            angles.append(turns.flatten(1).repeat(frames, 1))

        joined = torch.cat(angles).unsqueeze(1).to(device)
        return torch.stack((joined.cos(), joined.sin()))

    def _in_squares(self, grid: Tensor) -> Tensor:
        """Reorder ``[height, width, *]`` so that the patches of a square stand together."""
        size = self.merge_size
        height, width, last = grid.shape
        squares = grid.reshape(height // size, size, width // size, size, last).transpose(1, 2)
        return squares.reshape(height, width, last)


def _stretch(side: int, size: int, device: Device) -> tuple[Tensor, Tensor, Tensor]:
    """The two entries of a table between which each place lies, and how far behind the first one."""
    places = torch.linspace(0, side - 1, size, device=device)
    first = places.long()
    return first, (first + 1).clamp(max=side - 1), places - first


def _interpolate(table: Tensor, places: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    first, second, share = places
    share = share.view(-1, 1, 1)
    return table[first] * (1.0 - share) + table[second] * share


@final
class PatchMerger(Module):
    """Makes one token of a square of patches."""

    def __init__(
        self, norm: LayerNorm, inner_proj: ColumnShardedLinear, output_proj: RowShardedLinear, *, norm_first: bool
    ) -> None:
        """
        :param norm_first: whether patches are normalised before they are joined, each by itself, or after it.
        """
        super().__init__()
        self.norm = norm
        self.inner_proj = inner_proj
        self.activation = create_activation("gelu", field="activation")
        self.output_proj = output_proj
        self.norm_first = norm_first

    @override
    def forward(self, states: Tensor) -> Tensor:
        """
        :param states: *Shape:* ``[S, C]``.
        :returns: *Shape:* ``[U, M]``.
        """
        if self.norm_first:
            states = self.norm(states)
        states = states.reshape(-1, self.inner_proj.input_dim)
        if not self.norm_first:
            states = self.norm(states)

        tokens: Tensor = self.output_proj(self.activation(self.inner_proj(states)))
        return tokens

    if TYPE_CHECKING:
        __call__ = forward

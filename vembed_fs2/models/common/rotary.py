"""Rotary positions over padded and packed batches (Su et al., 2021, https://arxiv.org/abs/2104.09864).

Shapes: N sequences, S tokens, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from fairseq2.device import Device
from fairseq2.error import NotSupportedError
from fairseq2.nn import BatchLayout, IncrementalStateBag, PositionEncoder
from torch import Tensor
from typing_extensions import override

from vembed_fs2.models.common.attention import PackedLayout, PaddedLayout


class RotaryLayout(PaddedLayout):  # type: ignore[misc]  # final in fairseq2
    """A layout that carries the rotations of positions, which are the same in all layers of a kind."""

    rotations: Sequence[Tensor]
    """
    Cosines and sines for each kind of layers. *Shape:* ``[2, S, 1, K / 2]`` each, or ``[2, N, S, 1, K / 2]`` if
    sequences have positions of their own.
    """

    def __init__(self, seqs: Tensor, mask: Tensor | None, rotations: Sequence[Tensor]) -> None:
        """
        :param seqs: *Shape:* ``[N, S, *]``.
        :param mask: True for tokens, which precede the padding. *Shape:* ``[N, S]``.
        """
        super().__init__(seqs, mask)
        self.rotations = rotations


class PackedRotaryLayout(PackedLayout):  # type: ignore[misc]  # final in fairseq2
    """A :class:`RotaryLayout` of packed sequences, with the rotation of each token."""

    rotations: Sequence[Tensor]
    """*Shape:* ``[2, tokens, 1, K / 2]`` each."""

    def __init__(self, mask: Tensor, rotations: Sequence[Tensor]) -> None:
        """
        :param mask: True for tokens, which precede the padding. *Shape:* ``[N, S]``.
        :param rotations: of positions, or of the tokens of each sequence. *Shape:* ``[2, S, 1, K / 2]`` or
            ``[2, N, S, 1, K / 2]`` each.
        """
        super().__init__(mask)
        positions = self.indices % mask.size(1)
        self.rotations = [
            r.index_select(1, positions) if r.dim() == 4 else r.flatten(1, 2).index_select(1, self.indices)
            for r in rotations
        ]


def create_frequencies(head_dim: int, theta: float, device: Device) -> Tensor:
    """The angle by which each pair of dimensions turns from one position to the next. *Returns:* ``[K / 2]``."""
    dims = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device)
    return 1.0 / theta ** (dims.float() / head_dim)


def create_rotation(length: int, frequencies: Tensor, scale: float = 1.0) -> Tensor:
    """Return the cosines and sines of all positions up to ``length``. *Shape:* ``[2, S, 1, K / 2]``.

    :param frequencies: as :func:`create_frequencies` returns them.
    :param scale: what cosines and sines are multiplied by.
    """
    steps = torch.arange(length, dtype=torch.float32, device=frequencies.device)
    angles = torch.outer(steps, frequencies).unsqueeze(1)
    rotation = torch.stack((angles.cos(), angles.sin()))
    return rotation if scale == 1.0 else rotation * scale


@final
class RotaryPositions(PositionEncoder):
    """Rotates the halves of queries and keys by the angles of a :class:`RotaryLayout`."""

    def __init__(self, head_dim: int, *, kind: int = 0) -> None:
        """
        :param kind: which of the layout's rotations to take.
        """
        super().__init__(head_dim)
        self.kind = kind

    @override
    def forward(
        self, seqs: Tensor, seqs_layout: BatchLayout, *, state_bag: IncrementalStateBag | None = None
    ) -> Tensor:
        """
        :param seqs: *Shape:* ``[N, S, H, K]``, or packed.
        :returns: *Shape:* the same.
        """
        rotations: Sequence[Tensor] | None = getattr(seqs_layout, "rotations", None)
        if rotations is None:
            raise NotSupportedError(f"`{RotaryPositions}` needs a `{RotaryLayout}`.")

        rotation = rotations[self.kind]
        # In float32, whatever the states are: half precision would round the angles of distant tokens.
        cos, sin = rotation
        left, right = seqs.to(torch.promote_types(seqs.dtype, rotation.dtype)).chunk(2, dim=-1)

        turned_left = (left * cos).addcmul_(right, sin, value=-1.0)
        turned_right = (right * cos).addcmul_(left, sin)

        return torch.cat((turned_left.type_as(seqs), turned_right.type_as(seqs)), dim=-1)

    if TYPE_CHECKING:
        __call__ = forward

    @override
    def extra_repr(self) -> str:
        return f"encoding_dim={self.encoding_dim}, kind={self.kind}"

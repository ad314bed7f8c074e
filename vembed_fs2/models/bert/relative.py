"""Attention with a learned bias for the distance of two tokens, as MPNet has it.

Shapes: T texts, L tokens, H heads (of this tensor parallel rank), A all heads, M model size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, final

import torch
from fairseq2.error import NotSupportedError
from fairseq2.gang import get_current_gangs
from fairseq2.nn import BatchLayout, StandardEmbedding
from fairseq2.ops.tensor_parallel import reduce_on_backward
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.models.common.attention import EncoderSDPA, PackedLayout, PaddedLayout, attend

NUM_BUCKETS: Final = 32
"""The buckets that transformers' MPNet puts distances in, whatever its configuration says."""

_MAX_DISTANCE: Final = 128


@final
class RelativePositions(Module):
    """The bias of each head for each distance of two tokens, the same in all layers.

    Distances share buckets as in T5 (Raffel et al., 2020, https://arxiv.org/abs/1910.10683):
    one bucket each for the near ones, then wider and wider ones.
    """

    def __init__(self, embed: StandardEmbedding) -> None:
        """
        :param embed: the bias of each head for each bucket of distances.
        """
        super().__init__()
        self.embed = embed
        self.tp_gang = get_current_gangs().tp

    @override
    def forward(self, length: int) -> Tensor:
        """
        :param length: the number of tokens.
        :returns: what to add to the attention weights. *Shape:* ``[H, L, L]``.
        """
        distances = torch.arange(1 - length, length, device=self.embed.weight.device)

        bias_AR = self.embed(_bucket_of(distances)).transpose(0, 1)
        if self.tp_gang.size > 1:
            # Each rank has some of the heads, and so the gradient of only these.
            bias_AR = reduce_on_backward(bias_AR, self.tp_gang).chunk(self.tp_gang.size)[self.tp_gang.rank]

        # Token i is (length - 1 - i) distances away from the first column of the last row.
        return bias_AR.unfold(1, length, 1).flip(1)

    if TYPE_CHECKING:
        __call__ = forward


def _bucket_of(distances: Tensor) -> Tensor:
    """The bucket of each distance, from a token to the one that it attends to; those to later ones are apart."""
    half = NUM_BUCKETS // 2
    exact = half // 2
    size = distances.abs()

    # In the order of transformers' operations, for equal rounding.
    wide = torch.log(size.clamp(min=1).float() / exact) / math.log(_MAX_DISTANCE / exact) * (half - exact)
    wide = (exact + wide.long()).clamp(max=half - 1)

    return torch.where(size < exact, size, wide) + (distances > 0) * half


class RelativeLayout(PaddedLayout):  # type: ignore[misc]  # final in fairseq2
    """A layout that carries the attention bias of all layers."""

    bias: Tensor
    """What to add to the attention weights, a very low number for padding. *Shape:* ``[T or 1, H, L, L]``."""

    def __init__(self, seqs: Tensor, mask: Tensor | None, bias: Tensor) -> None:
        """
        :param seqs: *Shape:* ``[T, L, M]``.
        :param mask: True for tokens, which precede the padding. *Shape:* ``[T, L]``.
        :param bias: *Shape:* ``[H, L, L]``.
        """
        super().__init__(seqs, mask)

        self.bias = bias.unsqueeze(0)
        if self.mask is not None:
            # Not infinity: the softmax of a text without any token would be no number.
            padding = bias.new_zeros(self.mask.shape).masked_fill_(~self.mask, torch.finfo(bias.dtype).min)
            self.bias = self.bias + padding[:, None, None, :]


class PackedRelativeLayout(PackedLayout):  # type: ignore[misc]  # final in fairseq2
    """A packed layout whose attention, which takes padded sequences, has a bias."""

    def __init__(self, seqs: Tensor, mask: Tensor, bias: Tensor) -> None:
        """
        :param seqs: *Shape:* ``[T, L, M]``.
        :param mask: True for tokens, which precede the padding. *Shape:* ``[T, L]``.
        :param bias: *Shape:* ``[H, L, L]``.
        """
        super().__init__(mask)
        self._relative = RelativeLayout(seqs, mask, bias)

    @override
    def padded_layout(self, seqs: Tensor) -> PaddedLayout:
        return self._relative


@final
class RelativeSDPA(EncoderSDPA):
    """Scaled dot-product attention with the bias of a :class:`RelativeLayout`.

    It is used whatever default the user set in fairseq2, because no other takes a learned bias.
    """

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, dropout_p: float) -> Tensor:
        if not isinstance(layout, RelativeLayout):
            raise NotSupportedError(f"`{RelativeSDPA}` needs a `{RelativeLayout}`.")

        return attend(q, k, v, layout.bias, dropout_p=dropout_p)

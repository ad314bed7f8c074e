"""Dropout that is fast on CPUs; torch spends a quarter of a training step there on drawing masks."""

from __future__ import annotations

from typing import Any, Final, final

import numpy as np
import torch
from fairseq2.device import CPU
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from typing_extensions import override

# Integers as wide as the floating-point types, whose bits a mask is applied to.
_BITS: Final = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}

# Elements that are worked on at once: they and their masks fit the cache of a core.
_BLOCK: Final = 2**18


def dropout(x: Tensor, p: float) -> Tensor:
    """Set elements to zero with probability ``p``, and scale the others to keep the mean.

    On CPUs four elements share one 64-bit random number, so ``p`` is rounded to
    a multiple of 2^-15; the scale belongs to the rounded value. Which elements
    are dropped does not depend on the data type. The mask is not kept for the
    backward pass, but drawn again.
    """
    if p == 0.0:
        return x
    if not has_fast_masks(x, p):
        return functional.dropout(x, p)
    return _Dropout.apply(x, Masks(p))  # type: ignore[no-any-return, no-untyped-call]


def has_fast_masks(x: Tensor, p: float) -> bool:
    """Whether :class:`Masks` can be applied to ``x``."""
    if x.device != CPU or x.dtype not in _BITS or torch.compiler.is_compiling():
        return False
    return 0 < round(p * 2**15) < 2**15


@final
class Masks:
    """Masks that can be drawn again: all follow from one number, which torch's generator draws."""

    scale: float
    """What keeps the mean of elements to which a mask was applied."""

    def __init__(self, p: float) -> None:
        """
        :param p: the probability that an element is dropped.
        """
        self._threshold = round(p * 2**15)
        self._seed = int(torch.randint(2**63 - 1, ()))
        self.scale = 2**15 / (2**15 - self._threshold)
        self.restart()

    def restart(self) -> None:
        """Begin again with the first mask."""
        # Several times as fast as torch's generator.
        self._generator = np.random.SFC64(self._seed)

    def draw(self, like: Tensor) -> Tensor:
        """Draw the next mask. *Returns:* integers as wide as the elements of ``like``: -1 for dropped ones, or else 0.

        :param like: on the CPU.
        """
        count = like.numel()
        words = self._generator.random_raw((count + 3) // 4)
        draws = torch.from_numpy(words.view(np.int16))[:count]

        # The low 15 bits minus the threshold are negative for dropped elements: their sign, repeated, is the mask.
        draws.bitwise_and_(2**15 - 1).sub_(self._threshold).bitwise_right_shift_(15)

        return draws.to(_BITS[like.dtype]).view(like.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, masks: Masks) -> Tensor:
        ctx.masks = masks
        return _drop(x, masks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.masks.restart()
        return _drop(grad, ctx.masks), None


def _drop(x: Tensor, masks: Masks) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    for source, target in zip(torch.split(x.view(-1), _BLOCK), torch.split(y.view(-1), _BLOCK)):
        torch.mul(source, masks.scale, out=target)
        dropped = masks.draw(target)
        target.view(dropped.dtype).bitwise_and_(dropped.bitwise_not_())

    return y


@final
class Dropout(torch.nn.Dropout):
    """:class:`torch.nn.Dropout` by :func:`dropout`."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p) if self.training else input

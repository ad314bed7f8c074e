"""Normalisation of each attention head by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from fairseq2.gang import maybe_get_current_gangs
from fairseq2.nn import LayerNorm
from fairseq2.ops.tensor_parallel import reduce_on_backward
from torch import Tensor, empty
from torch.nn import Parameter
from torch.nn.functional import rms_norm
from torch.nn.init import ones_
from typing_extensions import override


@final
class HeadRMSNorm(LayerNorm):
    """RMS normalisation of queries or keys, whose weights all heads share.

    Tensor parallelism splits the heads over ranks. The gradient of the weights
    is then the sum over all ranks, which fairseq2's ``RMSNorm`` does not take.
    """

    def __init__(self, head_dim: int, *, eps: float) -> None:
        """
        :param eps: the value added to the mean of squares.
        """
        super().__init__()
        gangs = maybe_get_current_gangs()
        self.tp_gang = gangs.tp if gangs is not None and gangs.tp.size > 1 else None
        self.eps = eps
        self.weight = Parameter(empty(head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights to 1."""
        ones_(self.weight)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """
        :param x: *Shape:* ``[*, K]``, with head size K.
        :returns: *Shape:* the same.
        """
        weight: Tensor = self.weight
        if self.tp_gang is not None:
            weight = reduce_on_backward(weight, self.tp_gang)

        return rms_norm(x, weight.shape, weight, self.eps)

    if TYPE_CHECKING:
        __call__ = forward

    @override
    def extra_repr(self) -> str:
        return f"head_dim={self.weight.numel()}, eps={self.eps:G}"

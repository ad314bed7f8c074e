"""Feed-forward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import torch
from fairseq2.device import CPU
from fairseq2.nn import ColumnShardedLinear
from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.activations import Activation
from vembed_fs2.fairseq2_seams import OpenFeedForwardNetwork

# How oneDNN computes the functions that it can apply to a matrix product while that is in the cache.
_GELU: Final = {"exact": "none", "tanh": "tanh"}

_HAS_ONEDNN: Final[bool] = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


@final
class FusedFeedForwardNetwork(OpenFeedForwardNetwork):  # type: ignore[misc]  # its base is final
    """fairseq2's, with bias and GELU added within the matrix product in inference on CPUs.

    As operations of their own, each passes over all inner states. Training
    also needs the states before the activation.
    """

    @override
    def forward(self, seqs: Tensor) -> Tensor:
        gelu = self._fused_gelu(seqs)
        if gelu is None:
            return super().forward(seqs)

        proj = self.inner_proj

        # What torch's own compiler calls for a linear layer and its activation.
        states = torch.ops.mkldnn._linear_pointwise(seqs, proj.weight, proj.bias, "gelu", [], _GELU[gelu])
        return self.output_proj(states)

    def _fused_gelu(self, seqs: Tensor) -> str | None:
        """The variant of GELU to compute within the matrix product, if that is possible."""
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or seqs.numel() == 0:
            return None

        # Single precision only: what it gains in others was not measured.
        if seqs.device != CPU or seqs.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not _HAS_ONEDNN:
            return None

        proj, activation = self.inner_proj, self.inner_activation

        # Not where an adapter has taken a module's place, or someone watches it.
        if type(proj) is not ColumnShardedLinear or not isinstance(activation, Activation) or self.inner_dropout:
            return None
        if any(m._forward_hooks or m._forward_pre_hooks for m in (proj, activation)):
            return None

        return activation.gelu

    if TYPE_CHECKING:
        __call__ = forward

"""Feed-forward networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import torch
from fairseq2.device import CPU
from fairseq2.nn import ColumnShardedLinear, RowShardedLinear
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.dtypes import has_bfloat16_products
from vembed_fs2.embedding.activations import Activation
from vembed_fs2.fairseq2_seams import OpenFeedForwardNetwork

# How oneDNN computes the functions that it can apply to a matrix product while that is in the cache.
_GELU: Final = {"exact": "none", "tanh": "tanh"}

_HAS_ONEDNN: Final[bool] = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


@final
class FusedFeedForwardNetwork(OpenFeedForwardNetwork):  # type: ignore[misc]  # its base is final
    """fairseq2's, with bias and GELU added within the matrix product in inference on CPUs.

    As operations of their own, each passes over all inner states. Training
    also needs the states before the activation. In bfloat16, where products
    take a quarter of the time, biases are added within them beside other
    activations and in the second projection, too.
    """

    @override
    def forward(self, seqs: Tensor) -> Tensor:
        proj, activation = self.inner_proj, self.inner_activation
        if not _can_fuse(seqs) or self.inner_dropout or not _is_plain(proj, ColumnShardedLinear, seqs):
            return super().forward(seqs)

        gelu = activation.gelu if isinstance(activation, Activation) and not _is_watched(activation) else None
        if gelu is not None:
            states = _project(seqs, proj, "gelu", _GELU[gelu])
        elif seqs.dtype == torch.bfloat16:
            states = activation(_project(seqs, proj))
        else:
            return super().forward(seqs)

        output_proj = self.output_proj
        is_plain = _is_plain(output_proj, RowShardedLinear, states) and not output_proj.sharded
        if is_plain and states.dtype == torch.bfloat16:
            return _project(states, output_proj)

        return output_proj(states)

    if TYPE_CHECKING:
        __call__ = forward


def _can_fuse(seqs: Tensor) -> bool:
    """Whether oneDNN can take these states, and nothing needs those before the activation."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or seqs.numel() == 0:
        return False
    if seqs.device != CPU or not _HAS_ONEDNN or torch.is_autocast_enabled("cpu"):
        return False

    # What it gains in other types was not measured, and oneDNN may not compute them at all.
    return seqs.dtype == torch.float32 or (seqs.dtype == torch.bfloat16 and has_bfloat16_products())


def _is_plain(proj: Module, kls: type[Module], seqs: Tensor) -> bool:
    """Whether a projection only multiplies: no adapter has taken its place, and no one watches it."""
    return type(proj) is kls and proj.weight.dtype == seqs.dtype and not _is_watched(proj)


def _is_watched(module: Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _project(seqs: Tensor, proj: Module, operation: str = "none", variant: str = "") -> Tensor:
    # What torch's own compiler calls for a linear layer and its activation.
    states: Tensor = torch.ops.mkldnn._linear_pointwise(seqs, proj.weight, proj.bias, operation, [], variant)
    return states

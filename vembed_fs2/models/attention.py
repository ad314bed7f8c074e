"""Bidirectional attention over padded batches, without a wait for the device.

Shapes: N sequences, S tokens, H heads, K head size.
"""

from __future__ import annotations

from typing import Any, final

import torch
from fairseq2.device import CPU
from fairseq2.error import NotSupportedError
from fairseq2.models.transformer import (
    SDPA,
    AttentionBiasCache,
    IdentityBias,
    TorchSDPA,
    create_default_sdpa,
    get_default_sdpa_factory,
)
from fairseq2.nn import BatchLayout
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import override


class PaddedLayout(BatchLayout):  # type: ignore[misc]  # final in fairseq2
    """A batch layout that is known by its mask.

    fairseq2's layout holds the lengths as Python integers, for which the host
    has to wait for the device, and writes its position table one row at a time.
    Attention needs neither where it has the mask, so this layout works them out
    when something first asks for them (Flash Attention does).
    """

    mask: Tensor | None
    """True for tokens; ``None`` if nothing is padded. *Shape:* ``[N, S]``, bool."""

    def __init__(self, seqs: Tensor, mask: Tensor | None) -> None:
        """
        :param seqs: the padded sequences. *Shape:* ``[N, S, *]``.
        :param mask: True for tokens, which precede the padding. *Shape:* ``[N, S]``.
        """
        self._shape = (seqs.size(0), seqs.size(1))
        self._device = seqs.device
        if mask is not None:
            mask = mask.bool()
            # Free on the CPU, and worth a faster kernel.
            if mask.device == CPU and bool(mask.all()):
                mask = None
        self.mask = mask

    def __getattr__(self, name: str) -> Any:
        # The attributes of the base class, at their first use.
        if not name.startswith("_") or name.startswith("__") or "_width" in self.__dict__:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        seq_lens = None if self.mask is None else self.mask.sum(1).tolist()
        super().__init__(self._shape, seq_lens, device=self._device)
        return getattr(self, name)


@final
class PaddedSDPA(SDPA):
    """Scaled dot-product attention of every token to all tokens of its sequence."""

    def __init__(self, *, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.dropout_p = dropout_p

    @override
    def forward(
        self,
        q: Tensor,
        q_layout: BatchLayout,
        k: Tensor,
        k_layout: BatchLayout,
        v: Tensor,
        bias_cache: AttentionBiasCache,
        *,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if needs_weights:
            raise NotSupportedError(f"`{PaddedSDPA}` does not support `needs_weights`.")
        mask = _key_mask(k, k_layout)
        attns = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        return attns.transpose(1, 2), None

    @override
    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p:G}"


def _key_mask(keys: Tensor, layout: BatchLayout) -> Tensor | None:
    if isinstance(layout, PaddedLayout):
        return layout.mask
    if layout.packed:
        raise NotSupportedError(f"`{PaddedSDPA}` does not support packed batches.")
    if not layout.padded:
        return None
    return torch.arange(keys.size(1), device=keys.device) < layout.seq_lens_pt.unsqueeze(1)


def create_bidirectional_sdpa(*, dropout_p: float = 0.0) -> SDPA:
    """Create the attention of an encoder: :class:`PaddedSDPA`, unless the user set another default in fairseq2."""
    if get_default_sdpa_factory() is TorchSDPA:
        return PaddedSDPA(dropout_p=dropout_p)
    return create_default_sdpa(IdentityBias(), dropout_p=dropout_p)

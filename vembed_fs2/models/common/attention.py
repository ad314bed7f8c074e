"""Attention over padded and packed batches.

Shapes: N sequences, S tokens, H heads, K head size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Final, final

import torch
from fairseq2.device import CPU
from fairseq2.error import NotSupportedError
from fairseq2.models.transformer import (
    SDPA,
    AttentionBiasCache,
    CausalAttentionBias,
    Flash2SDPA,
    Flash3SDPA,
    IdentityBias,
    TorchSDPA,
    create_default_sdpa,
    get_default_sdpa_factory,
)
from fairseq2.nn import BatchLayout
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import override

from vembed_fs2.fairseq2_seams import OpenBatchLayout
from vembed_fs2.models.common.bfloat16_attention import attend_in_bfloat16, can_attend_in_bfloat16
from vembed_fs2.models.common.dropout import Masks, has_fast_masks
from vembed_fs2.models.common.dropout_attention import attend_with_dropout

# Longer sequences would need too much memory for their attention weights.
_MATMUL_WIDTH: Final = 1024

# The share of padding from which a batch is packed on CPUs.
_PACKED_FROM: Final = 0.1


def _of_full(name: str) -> Any:
    """Make a property that is the one of that name of the full layout."""
    return property(lambda self: getattr(self.full(), name))


class PaddedLayout(OpenBatchLayout):  # type: ignore[misc]  # its base is final
    """A batch layout that is known by its mask.

    fairseq2's layout holds the lengths as Python integers, for which the host
    has to wait for the device, and writes its position table one row at a time.
    Attention needs neither if it has the mask, so this layout wraps a full one,
    which it makes when something first asks for it (Flash Attention does).
    """

    seq_begin_indices = _of_full("seq_begin_indices")
    seq_begin_indices_pt = _of_full("seq_begin_indices_pt")
    seq_lens = _of_full("seq_lens")
    seq_lens_pt = _of_full("seq_lens_pt")
    min_seq_len = _of_full("min_seq_len")
    max_seq_len = _of_full("max_seq_len")
    position_indices = _of_full("position_indices")
    padded = _of_full("padded")

    mask: Tensor | None
    """True for tokens; ``None`` if nothing is padded. *Shape:* ``[N, S]``, bool."""

    def __init__(self, seqs: Tensor, mask: Tensor | None) -> None:
        """
        :param seqs: the padded sequences. *Shape:* ``[N, S, *]``.
        :param mask: True for tokens, which precede the padding. *Shape:* ``[N, S]``.
        """
        # Not the constructor of the base class, which waits for the device.
        self._shape = (seqs.size(0), seqs.size(1))
        self._device = seqs.device
        self._full: BatchLayout | None = None

        if mask is not None:
            mask = mask.bool()
            # Free on the CPU, and worth a faster kernel.
            if mask.device == CPU and bool(mask.all()):
                mask = None

        self.mask = mask

    def full(self) -> BatchLayout:
        """Return fairseq2's own layout, the same one each time."""
        if self._full is None:
            seq_lens = None if self.mask is None else self.mask.sum(1).tolist()
            self._full = BatchLayout(self._shape, seq_lens, device=self._device)

        return self._full

    @property
    @override
    def width(self) -> int:
        return self._shape[1]

    @property
    @override
    def packed(self) -> bool:
        return False

    @override
    def __repr__(self) -> str:
        return repr(self.full())


class PackedLayout(OpenBatchLayout):  # type: ignore[misc]  # its base is final
    """The layout of sequences that stand one after the other, without padding.

    What is done to each token by itself, nearly all of a Transformer's work, is
    not done to padding. The host waits for the device once per batch.
    """

    mask: Tensor
    """True for tokens of the padded batch. *Shape:* ``[N, S]``, bool."""

    indices: Tensor
    """The positions of the tokens in the padded batch, row after row. *Shape:* ``[tokens]``."""

    def __init__(self, mask: Tensor) -> None:
        """
        :param mask: True for tokens, which precede the padding. *Shape:* ``[N, S]``.
        """
        self.mask = mask.bool()
        self.indices = self.mask.flatten().nonzero().squeeze(1)
        lengths = [n for n in self.mask.sum(1).tolist() if n > 0]
        super().__init__((self.indices.numel(),), lengths, packed=True, device=mask.device)

    def pack(self, seqs: Tensor) -> Tensor:
        """Leave padding out. ``[N, S, *]`` becomes ``[tokens, *]``."""
        return seqs.flatten(0, 1).index_select(0, self.indices)

    def pad(self, seqs: Tensor) -> Tensor:
        """Undo :meth:`pack`, with zeros for padding. ``[tokens, *]`` becomes ``[N, S, *]``."""
        padded = seqs.new_zeros((self.mask.numel(), *seqs.shape[1:])).index_copy(0, self.indices, seqs)
        return padded.view(*self.mask.shape, *seqs.shape[1:])

    def padded_layout(self, seqs: Tensor) -> PaddedLayout:
        """Return the layout of ``seqs`` that :meth:`pad` padded, for attention that takes no packed ones."""
        return PaddedLayout(seqs, self.mask)


def default_needs_packing() -> bool:
    """Whether the attention that the user set as the default in fairseq2 takes no padding."""
    return get_default_sdpa_factory() in (Flash2SDPA, Flash3SDPA)


def should_pack(mask: Tensor, *, needed: bool) -> bool:
    """Whether a batch is to be packed.

    Our own attention pads again. On CPUs that pays where padding is a good part
    of the batch; on GPUs the host would wait for the device.

    :param mask: True for tokens. *Shape:* ``[N, S]``.
    :param needed: whether attention takes no padding.
    """
    if needed:
        return not bool(mask.all())
    if mask.device != CPU or torch.compiler.is_compiling():
        return False
    return int(mask.sum()) < (1.0 - _PACKED_FROM) * mask.numel()


class EncoderSDPA(SDPA):
    """Base of the attention of encoders, which looks at the layout of the keys and gives no weights."""

    takes_packed: bool = False
    """If ``True``, :meth:`attend` takes packed sequences; else they are padded before it and packed after it."""

    def __init__(self, *, dropout_p: float = 0.0) -> None:
        """
        :param dropout_p: the dropout probability on attention weights.
        """
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
            raise NotSupportedError(f"`{type(self)}` does not support `needs_weights`.")

        dropout_p = self.dropout_p if self.training else 0.0
        if not isinstance(k_layout, PackedLayout) or self.takes_packed:
            return self.attend(q, k, v, k_layout, dropout_p), None

        q, k, v = (k_layout.pad(x) for x in (q, k, v))
        attns = self.attend(q, k, v, k_layout.padded_layout(q), dropout_p)

        return k_layout.pack(attns), None

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, dropout_p: float) -> Tensor:
        """Compute scaled dot-product attention.

        :param q: *Shape:* ``[N, S, H, K]``; ``[tokens, H, K]`` if the batch is packed.
        :param k: as is ``v``, *Shape:* ``[N, S_kv, H, K]``; ``[tokens, H, K]`` if the batch is packed.
        :param layout: the layout of the keys.
        :param dropout_p: 0 unless the module is in training.
        :returns: *Shape:* as is ``q``.
        :raises NotSupportedError: the attention does not take the layout.
        """

    @override
    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p:G}"


@final
class PaddedSDPA(EncoderSDPA):
    """Scaled dot-product attention of every token to all tokens of its sequence, or (causal) to those before it."""

    def __init__(self, *, dropout_p: float = 0.0, causal: bool = False, window: int | None = None) -> None:
        """
        :param window: the number of tokens that a causal token attends to, itself included; ``None`` for all.
        """
        super().__init__(dropout_p=dropout_p)
        self.causal = causal
        self.window = window

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, dropout_p: float) -> Tensor:
        if self.window is not None and k.size(1) > self.window:
            seen = torch.ones((k.size(1), k.size(1)), dtype=torch.bool, device=k.device).tril().triu(1 - self.window)
            return attend(q, k, v, seen[None, None], dropout_p=dropout_p)

        # Padding follows the tokens, so a causal token does not see it anyway.
        mask = None if self.causal else _key_mask(k, layout)
        bias = None if mask is None else mask[:, None, None, :]

        return attend(q, k, v, bias, dropout_p=dropout_p, causal=self.causal)

    @override
    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"{super().extra_repr()}, causal={self.causal}{window}"


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *, dropout_p: float = 0.0, causal: bool = False
) -> Tensor:
    """Compute scaled dot-product attention in the fastest way for the device.

    :param q: *Shape:* ``[N, S, H, K]``.
    :param k: as is ``v``, *Shape:* ``[N, S_kv, H, K]``.
    :param bias: True where a key counts, or what is added to the weights before the softmax.
        *Shape:* ``[N, H, S, S_kv]``; a size of 1 stands for all.
    :param causal: if ``True``, the keys after a query do not count.
    :returns: *Shape:* ``[N, S, H, K]``.
    """
    if dropout_p == 0.0 and can_attend_in_bfloat16(q, k, causal=causal):
        return attend_in_bfloat16(q, k, v, bias, causal=causal)

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)

    if has_fast_masks(q, dropout_p):
        attns = attend_with_dropout(q, k, v, bias, Masks(dropout_p), causal=causal)
    elif dropout_p == 0.0 and _is_slow_on_cpu(q):
        attns = _attend_by_matmul(q, k, v, bias, causal)
    else:
        attns = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, is_causal=causal)

    return attns.transpose(1, 2)


def _is_slow_on_cpu(q: Tensor) -> bool:
    """Whether the backward pass of torch's fused kernel takes several times as long as matrix products."""
    if q.device != CPU or q.size(2) > _MATMUL_WIDTH or torch.compiler.is_compiling():
        return False
    return q.dtype in (torch.bfloat16, torch.float16) and q.requires_grad


def _attend_by_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """Attention as two matrix products. *Shape:* all ``[N, H, S, K]``; the bias ``[N, H, S, S]``."""
    # Autocast would make float32 of the weights; softmax itself rounds only its result.
    with torch.autocast("cpu", enabled=False):
        weights = (q * q.size(-1) ** -0.5) @ k.transpose(-1, -2)
        if bias is not None and bias.dtype == torch.bool:
            bias = weights.new_zeros(bias.shape).masked_fill_(~bias, -torch.inf)
        if bias is not None:
            weights = weights + bias

        if causal:
            size = weights.size(-1)
            weights = weights + weights.new_full((size, size), -torch.inf).triu_(1)

        attns: Tensor = weights.softmax(-1) @ v
        return attns


def _key_mask(keys: Tensor, layout: BatchLayout) -> Tensor | None:
    if isinstance(layout, PaddedLayout):
        return layout.mask
    if layout.packed:
        raise NotSupportedError(f"`{PaddedSDPA}` does not support packed batches.")
    if not layout.padded:
        return None

    return torch.arange(keys.size(1), device=keys.device) < layout.seq_lens_pt.unsqueeze(1)


def create_sdpa(*, dropout_p: float = 0.0, causal: bool = False, window: int | None = None) -> SDPA:
    """Create the attention of an encoder: :class:`PaddedSDPA`, unless the user set another default in fairseq2.

    :param window: the number of tokens that a causal token attends to, itself included; ``None`` for all.
    """
    if get_default_sdpa_factory() is TorchSDPA:
        return PaddedSDPA(dropout_p=dropout_p, causal=causal, window=window)

    bias = CausalAttentionBias(attn_window_len=window) if causal else IdentityBias()
    return create_default_sdpa(bias, dropout_p=dropout_p)

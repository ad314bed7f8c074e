"""ModernBERT's attention: rotary positions, and layers in which a token sees only its neighbours.

Shapes: N sequences, S tokens, H heads, K head size, B blocks, C tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, final

import torch
from fairseq2.data_type import DataType
from fairseq2.device import Device
from fairseq2.error import NotSupportedError, OperationalError
from fairseq2.models.transformer import (
    SDPA,
    AttentionBias,
    Flash2SDPA,
    TorchSDPA,
    create_default_sdpa,
    get_default_sdpa_factory,
)
from fairseq2.nn import BatchLayout, IncrementalStateBag, PositionEncoder
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from vembed_fs2.models.common.attention import EncoderSDPA, PackedLayout, PaddedLayout, attend

_MIN_BLOCK: Final = 32


class RotaryLayout(PaddedLayout):  # type: ignore[misc]  # final in fairseq2
    """A layout that carries the rotations of positions, which are the same in all layers of a kind."""

    global_rotation: Tensor
    """Cosines and sines for layers that attend to all tokens. *Shape:* ``[2, S, 1, K / 2]``."""

    local_rotation: Tensor
    """The same for layers that attend to near tokens."""

    def __init__(self, seqs: Tensor, mask: Tensor | None, rotations: Sequence[Tensor]) -> None:
        """
        :param seqs: *Shape:* ``[N, S, *]``.
        :param mask: True for tokens, which precede the padding. *Shape:* ``[N, S]``.
        :param rotations: global and local ones.
        """
        super().__init__(seqs, mask)
        self.global_rotation, self.local_rotation = rotations


class PackedRotaryLayout(PackedLayout):  # type: ignore[misc]  # final in fairseq2
    """A :class:`RotaryLayout` of packed sequences, with the rotation of each token."""

    global_rotation: Tensor
    """*Shape:* ``[2, tokens, 1, K / 2]``."""

    local_rotation: Tensor

    def __init__(self, mask: Tensor, rotations: Sequence[Tensor]) -> None:
        """
        :param mask: True for tokens, which precede the padding. *Shape:* ``[N, S]``.
        :param rotations: global and local ones, of positions. *Shape:* ``[2, S, 1, K / 2]``.
        """
        super().__init__(mask)
        positions = self.indices % mask.size(1)
        self.global_rotation, self.local_rotation = (r.index_select(1, positions) for r in rotations)


def create_rotation(length: int, head_dim: int, theta: float, device: Device) -> Tensor:
    """The cosines and sines of Su et al., 2021 (https://arxiv.org/abs/2104.09864). *Returns:* ``[2, S, 1, K / 2]``."""
    dims = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device)
    frequencies = 1.0 / theta ** (dims.float() / head_dim)
    steps = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(steps, frequencies).unsqueeze(1)
    return torch.stack((angles.cos(), angles.sin()))


@final
class RotaryPositions(PositionEncoder):
    """Rotates the halves of queries and keys by the angles of a :class:`RotaryLayout`."""

    def __init__(self, head_dim: int, *, local: bool) -> None:
        super().__init__(head_dim)
        self.local = local

    @override
    def forward(
        self, seqs: Tensor, seqs_layout: BatchLayout, *, state_bag: IncrementalStateBag | None = None
    ) -> Tensor:
        """
        :param seqs: *Shape:* ``[N, S, H, K]``, or packed.
        :returns: *Shape:* the same.
        """
        if not isinstance(seqs_layout, (RotaryLayout, PackedRotaryLayout)):
            raise NotSupportedError(f"`{RotaryPositions}` needs a `{RotaryLayout}`.")

        rotation = seqs_layout.local_rotation if self.local else seqs_layout.global_rotation
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
        return f"encoding_dim={self.encoding_dim}, local={self.local}"


def create_local_sdpa(reach: int, *, dropout_p: float) -> SDPA:
    """Create attention to near tokens: :class:`LocalSDPA`, unless the user set another default in fairseq2.

    :param reach: how far away a token may be.
    """
    factory = get_default_sdpa_factory()
    if factory is TorchSDPA:
        return LocalSDPA(reach, dropout_p=dropout_p)
    if factory is Flash2SDPA:
        return FlashLocalSDPA(reach, dropout_p=dropout_p)
    return create_default_sdpa(LocalAttentionBias(reach), dropout_p=dropout_p)


@final
class LocalAttentionBias(AttentionBias):
    """Lets a token attend to tokens on both sides, up to a distance."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def __eq__(self, other: object) -> bool:
        return self.reach == other.reach if isinstance(other, LocalAttentionBias) else NotImplemented

    def __hash__(self) -> int:
        return hash(("local", self.reach))

    def __repr__(self) -> str:
        return f"LocalAttentionBias(reach={self.reach})"

    @override
    def create_bias_tensor(self, q_len: int, k_len: int, device: Device, dtype: DataType) -> Tensor:
        near = _near(torch.arange(q_len, device=device), torch.arange(k_len, device=device), self.reach)
        return torch.zeros((q_len, k_len), device=device, dtype=dtype).masked_fill_(~near, -torch.inf)


@final
class LocalSDPA(EncoderSDPA):
    """Scaled dot-product attention of every token to the tokens on both sides of it, up to a distance.

    Long sequences are cut into blocks of queries, each with the keys that they can reach: the cost grows with the
    length, and not with its square.
    """

    def __init__(self, reach: int, *, dropout_p: float = 0.0) -> None:
        super().__init__(dropout_p=dropout_p)
        self.reach = reach

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, dropout_p: float) -> Tensor:
        if not isinstance(layout, PaddedLayout):
            raise NotSupportedError(f"`{LocalSDPA}` needs a `{PaddedLayout}`.")

        mask, length = layout.mask, k.size(1)

        # Under `torch.compile` every branch is a recompilation, and torch limits those.
        if length <= self.reach + 1 and not torch.compiler.is_compiling():
            bias = None if mask is None else mask[:, None, None, :]
            return attend(q, k, v, bias, dropout_p=dropout_p)

        block = max(self.reach, _MIN_BLOCK)
        if length > 4 * block:
            return _attend_in_blocks(q, k, v, mask, self.reach, block, dropout_p)

        positions = torch.arange(length, device=q.device)

        bias = _near(positions, positions, self.reach)[None, None]
        if mask is not None:
            # A token sees itself even if it is padding: without any key its state would not be a number.
            own = torch.eye(length, dtype=torch.bool, device=q.device)
            bias = bias & mask[:, None, None, :] | own

        return attend(q, k, v, bias, dropout_p=dropout_p)

    @override
    def extra_repr(self) -> str:
        return f"reach={self.reach}, {super().extra_repr()}"


@final
class FlashLocalSDPA(EncoderSDPA):
    """:class:`LocalSDPA` by FlashAttention 2 (Dao, 2023, https://arxiv.org/abs/2307.08691), which takes no padding.

    fairseq2's own ``Flash2SDPA`` has windows only before a token.
    """

    takes_packed = True

    def __init__(self, reach: int, *, dropout_p: float = 0.0) -> None:
        super().__init__(dropout_p=dropout_p)
        self.reach = reach

    @override
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: BatchLayout, dropout_p: float) -> Tensor:
        if layout.padded:
            raise NotSupportedError(f"`{FlashLocalSDPA}` takes no padding.")

        try:
            from flash_attn import flash_attn_func, flash_attn_varlen_func
        except ImportError:
            raise OperationalError("FlashAttention is not found. Install it with `pip install flash-attn`.") from None

        if torch.is_autocast_enabled(q.device.type):
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))

        options = {"dropout_p": dropout_p, "window_size": (self.reach, self.reach)}
        attns: Tensor
        if layout.packed:
            begins, longest = layout.seq_begin_indices_pt, layout.max_seq_len
            attns = flash_attn_varlen_func(q, k, v, begins, begins, longest, longest, **options)
        else:
            attns = flash_attn_func(q, k, v, **options)

        return attns

    @override
    def extra_repr(self) -> str:
        return f"reach={self.reach}, {super().extra_repr()}"


def _near(queries: Tensor, keys: Tensor, reach: int) -> Tensor:
    """Which positions of keys each position of queries reaches. *Shape:* ``[S, S_kv]``, bool."""
    return (queries.unsqueeze(1) - keys).abs() <= reach


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, reach: int, block: int, dropout_p: float
) -> Tensor:
    """Attention of each block of queries to the keys of itself and of its neighbours on both sides.

    :param q: as are ``k`` and ``v``, *Shape:* ``[N, S, H, K]``.
    :param mask: True for tokens. *Shape:* ``[N, S]``.
    :param block: the tokens of a block, at least ``reach``.
    """
    size, length = q.shape[:2]
    count = -(-length // block)
    tail = count * block - length

    # Blocks become rows: [N * B, C, H, K] and, with their neighbours, [N * B, 3 * C, H, K].
    q = pad(q, (0, 0, 0, 0, 0, tail)).reshape(size * count, block, *q.shape[2:])
    k, v = (_with_neighbours(x, block, tail).flatten(0, 1) for x in (k, v))

    if mask is None:
        mask = torch.ones((1, length), dtype=torch.bool, device=q.device).expand(size, -1)

    known = pad(mask, (block, block + tail)).unfold(1, 3 * block, block).flatten(0, 1)
    queries, keys = torch.arange(block, device=q.device), torch.arange(-block, 2 * block, device=q.device)

    # A token sees itself even if it is padding: without any key its state would not be a number.
    bias = _near(queries, keys, reach) & known[:, None, None, :] | _near(queries, keys, 0)
    attns = attend(q, k, v, bias, dropout_p=dropout_p)

    return attns.reshape(size, count * block, *attns.shape[2:])[:, :length]


def _with_neighbours(x: Tensor, block: int, tail: int) -> Tensor:
    """Cut into blocks, each with the block before and the block after it. *Shape:* ``[N, B, 3 * C, H, K]``."""
    padded = pad(x, (0, 0, 0, 0, block, block + tail))
    return padded.unfold(1, 3 * block, block).permute(0, 1, 4, 2, 3)

"""The layers of encoders, as all families put them together."""

from __future__ import annotations

from collections.abc import Callable

from fairseq2.models.transformer import (
    FeedForwardNetwork,
    MultiheadAttention,
    StandardTransformerEncoderLayer,
    TransformerNormOrder,
)
from fairseq2.nn import LayerNorm, Linear, ResidualConnect

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.models.common.dropout import Dropout
from vembed_fs2.models.common.feed_forward import FusedFeedForwardNetwork


def create_layer(
    self_attn: MultiheadAttention,
    ffn: FeedForwardNetwork,
    create_layer_norm: Callable[[], LayerNorm],
    *,
    norm_order: TransformerNormOrder = TransformerNormOrder.PRE,
    create_residual: Callable[[], ResidualConnect | None] = lambda: None,
    attn_dropout_p: float = 0.0,
    ffn_dropout_p: float = 0.0,
) -> StandardTransformerEncoderLayer:
    """Create a Transformer layer.

    :param create_residual: creates what adds a branch to what it branched from; ``None`` is a plain sum.
    :param attn_dropout_p: the dropout probability on outputs of attention.
    :param ffn_dropout_p: the dropout probability on outputs of the feed-forward network.
    """
    layer = StandardTransformerEncoderLayer(
        self_attn,
        create_layer_norm(),
        ffn,
        create_layer_norm(),
        norm_order=norm_order,
        self_attn_residual=create_residual(),
        ffn_residual=create_residual(),
    )

    # fairseq2's own dropout is slow on CPUs.
    if attn_dropout_p > 0.0:
        layer.self_attn_dropout = Dropout(attn_dropout_p)
    if ffn_dropout_p > 0.0:
        layer.ffn_dropout = Dropout(ffn_dropout_p)

    return layer


def create_ffn(
    model_dim: int, inner_dim: int, activation: str, init_fn: Callable[[Linear], None], *, bias: bool = True
) -> FusedFeedForwardNetwork:
    """Create a feed-forward network of two projections.

    :param activation: the activation function between them, by transformers' name.
    :param init_fn: sets the initial weights of both projections.
    """
    return FusedFeedForwardNetwork(
        model_dim,
        inner_dim,
        bias,
        inner_activation=create_activation(activation, field="activation"),
        proj_init_fn=init_fn,
    )

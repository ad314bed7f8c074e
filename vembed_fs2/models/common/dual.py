"""What the dual encoders of texts and images share: configurations of towers, their layers, embeddings of tokens.

Shapes: T texts, L tokens, M model size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from fairseq2.models.transformer import (
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerFrontend,
)
from fairseq2.nn import BatchLayout, IncrementalStateBag, Linear, ResidualConnect, StandardEmbedding, StandardLayerNorm
from fairseq2.utils.validation import ValidationResult
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from vembed_fs2.embedding.inputs import TextInputs
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.checks import (
    check_activation,
    check_heads,
    check_not_negative,
    check_positive,
    check_probabilities,
    to_result,
)
from vembed_fs2.models.common.config import TransformerSizes
from vembed_fs2.models.common.factory import create_embedding
from vembed_fs2.models.common.feed_forward import FusedFeedForwardNetwork
from vembed_fs2.models.common.layers import create_ffn, create_layer


@dataclass(kw_only=True)
class DualTowerConfig(TransformerSizes):
    """What the text and the image Transformer of a dual encoder have in common."""

    activation: str = "gelu"
    """The activation function of feed-forward networks, by transformers' name."""

    layer_norm_eps: float = 1e-5
    """The value added to the denominator of Layer Normalization."""

    attn_dropout_p: float = 0.0
    """The dropout probability on attention weights."""

    def validate(self) -> ValidationResult:
        return to_result(
            check_positive(self, *self._positive_fields()),
            check_heads(self),
            check_probabilities(self, "attn_dropout_p"),
            check_not_negative(self, *self._not_negative_fields()),
            check_activation(self),
        )

    def _not_negative_fields(self) -> tuple[str, ...]:
        return ("layer_norm_eps",)


class TowerBuilder:
    """Builds the Transformer of a tower, normalised before each branch; the family says how its weights start."""

    def __init__(
        self,
        config: DualTowerConfig,
        *,
        init_qkv: Callable[[Linear], None],
        init_output: Callable[[Linear], None],
        init_ffn: Callable[[Linear], None],
        causal: bool = False,
        create_residual: Callable[[], ResidualConnect | None] = lambda: None,
    ) -> None:
        """
        :param init_qkv: sets the initial weights of the projections of queries, keys and values.
        :param init_output: the same for the output projection of attention.
        :param init_ffn: the same for both projections of feed-forward networks.
        :param causal: if ``True``, no token sees the ones after it.
        :param create_residual: creates what adds a branch to what it branched from; ``None`` is a plain sum.
        """
        self._config = config
        self._init_qkv = init_qkv
        self._init_output = init_output
        self._init_ffn = init_ffn
        self._causal = causal
        self._create_residual = create_residual

    def create_encoder(self, *, norm: bool) -> StandardTransformerEncoder:
        """
        :param norm: if ``True``, the final states are normalised.
        """
        layers = [self.create_layer() for _ in range(self._config.num_layers)]

        return StandardTransformerEncoder(layers, self.create_layer_norm() if norm else None)

    def create_layer(self) -> StandardTransformerEncoderLayer:
        return create_layer(
            self.create_self_attention(),
            self.create_ffn(),
            self.create_layer_norm,
            create_residual=self._create_residual,
        )

    def create_self_attention(self) -> StandardMultiheadAttention:
        config = self._config

        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_sdpa(dropout_p=config.attn_dropout_p, causal=self._causal),
            qkv_proj_init_fn=self._init_qkv,
            output_proj_init_fn=self._init_output,
        )

    def create_ffn(self) -> FusedFeedForwardNetwork:
        config = self._config

        return create_ffn(config.model_dim, config.ffn_inner_dim, config.activation, self._init_ffn)

    def create_layer_norm(self) -> StandardLayerNorm:
        return StandardLayerNorm(self._config.model_dim, bias=True, eps=self._config.layer_norm_eps)


@final
class TextFrontend(TransformerFrontend):
    """Adds learned positions to token embeddings."""

    def __init__(self, embed: StandardEmbedding, pos_embed: StandardEmbedding) -> None:
        super().__init__()
        self.embed = embed
        self.pos_embed = pos_embed

    @override
    def forward(
        self, seqs: Tensor, seqs_layout: BatchLayout, *, state_bag: IncrementalStateBag | None = None
    ) -> tuple[Tensor, BatchLayout]:
        """
        :param seqs: the tokens. *Shape:* ``[T, L]``.
        :returns: their embeddings, *Shape:* ``[T, L, M]``, and the layout.
        """
        positions = torch.arange(seqs.size(1), device=seqs.device, dtype=torch.int64)

        return self.embed(seqs) + self.pos_embed(positions), seqs_layout


def create_text_frontend(vocab_size: int, max_seq_len: int, model_dim: int, std: float) -> TextFrontend:
    """
    :param std: the standard deviation of the initial embeddings and positions.
    """
    return TextFrontend(
        create_embedding(vocab_size, model_dim, std),
        create_embedding(max_seq_len, model_dim, std),
    )


def counted_tokens(text: TextInputs, length: int) -> Tensor | None:
    """True for the tokens that pooling looks at, in texts that the model has padded to ``length``.

    *Returns:* ``None`` if all count. ``[T, length]``.
    """
    mask, missing = text.pooled_tokens, length - text.input_ids.size(1)
    if missing == 0:
        return mask

    return pad(torch.ones_like(text.input_ids, dtype=torch.bool) if mask is None else mask, (0, missing))

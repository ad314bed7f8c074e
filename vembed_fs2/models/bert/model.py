"""BERT and its near relatives as embedding models.

Shapes: T texts, L tokens, M model size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from fairseq2.models.transformer import TransformerEncoder
from fairseq2.nn import Embedding, LayerNorm
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from typing_extensions import override

from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.models.bert.relative import PackedRelativeLayout, RelativeLayout, RelativePositions
from vembed_fs2.models.common.attention import PackedLayout, PaddedLayout, default_needs_packing, should_pack
from vembed_fs2.models.common.dropout import Dropout
from vembed_fs2.models.common.text_model import TextBackboneModel


@final
class BertModel(TextBackboneModel):
    """Represents BERT as described in :cite:t:`https://doi.org/10.48550/arxiv.1810.04805`, with pooling on top.

    Its relatives differ in how they number positions
    (RoBERTa, :cite:t:`https://doi.org/10.48550/arxiv.1907.11692`), in what they leave out
    (DistilBERT, :cite:t:`https://doi.org/10.48550/arxiv.1910.01108`), and by an attention bias
    (MPNet, :cite:t:`https://doi.org/10.48550/arxiv.2004.09297`).
    """

    def __init__(
        self,
        frontend: BertFrontend,
        encoder: TransformerEncoder,
        pooler: Module | None,
        relative_positions: RelativePositions | None,
    ) -> None:
        super().__init__()
        self.frontend = frontend
        self.relative_positions: RelativePositions | None
        self.register_module("relative_positions", relative_positions)
        self.encoder = encoder
        self.pooler: Module | None
        self.register_module("pooler", pooler)
        self.needs_packing = default_needs_packing()

    @override
    def encode_tokens(self, batch: EncoderBatch) -> Tensor:
        assert batch.text is not None

        mask = batch.text.attention_mask
        seqs = self.frontend(batch.text.input_ids, mask, batch.text.token_type_ids)
        bias = None if self.relative_positions is None else self.relative_positions(seqs.size(1))

        # Attention with a bias is always our own, which takes padding.
        if mask is not None and should_pack(mask, needed=self.needs_packing and bias is None):
            layout = PackedLayout(mask) if bias is None else PackedRelativeLayout(seqs, mask, bias)
            return layout.pad(self.encoder(layout.pack(seqs), layout))

        return self.encoder(seqs, PaddedLayout(seqs, mask) if bias is None else RelativeLayout(seqs, mask, bias))

    @override
    def pool_tokens(self, seqs: Tensor) -> Tensor | None:
        if not self.head.config.reads_pooler:
            return None
        assert self.pooler is not None
        return torch.tanh(self.pooler(seqs[:, 0]))

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [self.encoder.layers]


@final
class BertFrontend(Module):
    """Adds word, segment and position embeddings, and normalises them."""

    def __init__(
        self,
        embed: Embedding,
        type_embed: Embedding | None,
        pos_embed: Embedding,
        layer_norm: LayerNorm,
        dropout_p: float,
    ) -> None:
        """
        :param type_embed: ``None`` if the model has no segments.
        :param pos_embed: with a padding index, positions are numbered like RoBERTa's: padding tokens have that
            position wherever they are, and the others are counted from the position after it.
        """
        super().__init__()
        self.embed = embed
        self.type_embed: Embedding | None
        self.register_module("type_embed", type_embed)
        self.pos_embed = pos_embed
        self.layer_norm = layer_norm
        self.dropout = Dropout(dropout_p)
        first_position = 0 if pos_embed.pad_idx is None else pos_embed.pad_idx + 1
        self.max_length = pos_embed.num_embeddings - first_position

    @override
    def forward(self, input_ids: Tensor, mask: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        """
        :param input_ids: *Shape:* ``[T, L]``.
        :param mask: True for tokens; ``None`` means all. *Shape:* ``[T, L]``.
        :param token_type_ids: ``None`` means the first segment. *Shape:* ``[T, L]``.
        :returns: *Shape:* ``[T, L, M]``.
        :raises DataError: there are more tokens than positions.
        """
        length = input_ids.size(1)
        if length > self.max_length:
            raise DataError(f"A text has {length} tokens, but the model takes at most {self.max_length}. Truncate it.")

        # In the order in which transformers adds them, for equal rounding.
        seqs = self.embed(input_ids)
        if self.type_embed is not None:
            seqs = seqs + self.type_embed(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)

        seqs = seqs + self.pos_embed(self._positions(input_ids, mask))
        states: Tensor = self.dropout(self.layer_norm(seqs))
        return states

    def _positions(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """*Shape:* ``[L]`` or ``[T, L]``."""
        pad_idx = self.pos_embed.pad_idx
        if pad_idx is None:
            return torch.arange(input_ids.size(1), device=input_ids.device)

        # Padding may have any id: batches are joined with another one.
        counts = input_ids != pad_idx if mask is None else (input_ids != pad_idx) & mask.bool()
        return counts.cumsum(1) * counts + pad_idx

    if TYPE_CHECKING:
        __call__ = forward


@final
class UnusedPooler(Module):
    """Keeps the pooler's tensors for export where the pooling does not use them.

    They are frozen: a parameter without a gradient is an error under DDP. And no
    buffers, which FSDP2 does not shard: a run's checkpoint could not be loaded.
    """

    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty((model_dim, model_dim)), requires_grad=False)
        self.bias = Parameter(torch.empty((model_dim,)), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

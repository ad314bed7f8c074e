"""BERT as an embedding model.

Shapes: T texts, L tokens, M model size, D embedding size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from fairseq2.models.transformer import TransformerEncoder
from fairseq2.nn import Embedding, LayerNorm
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from typing_extensions import override

from vembed_fs2.errors import DataError
from vembed_fs2.models.attention import PaddedLayout
from vembed_fs2.models.dropout import Dropout
from vembed_fs2.models.embedding import EmbeddingModel, EncoderBatch
from vembed_fs2.models.head import TextHead


@final
class BertModel(EmbeddingModel):
    """Represents BERT as described in :cite:t:`https://doi.org/10.48550/arxiv.1810.04805`, with pooling on top."""

    def __init__(
        self, frontend: BertFrontend, encoder: TransformerEncoder, pooler: Module | None, head: TextHead
    ) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        self.pooler: Module | None
        self.register_module("pooler", pooler)
        self.head = head

    @override
    def encode_text(self, batch: EncoderBatch) -> Tensor:
        """Encode the texts of ``batch``.

        :returns: embeddings, not normalised. *Shape:* ``[T, D]``; ``[T, L, D]`` for the pooling "none".
        :raises DataError: a text is longer than the position table.
        """
        seqs = self.encode_tokens(batch)
        return self.head(seqs, _pooling_mask(batch), pooled=self._pool(seqs))

    @override
    def encode_rows(self, batch: EncoderBatch) -> tuple[Tensor, Tensor | None]:
        """Encode rows; with the pooling "none", each is one text, and the mask says which tokens' vectors count.

        :raises DataError: a row of such a model holds something else than one text.
        """
        if self.head.pooling != "none":
            return super().encode_rows(batch)
        if batch.pixel_values is not None or batch.num_texts != batch.num_rows:
            raise DataError("Each row of a model with several vectors per row must be one text, and no image.")
        mask = _pooling_mask(batch)
        vectors = self.encode_text(batch)
        return vectors, vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if mask is None else mask.bool()

    def encode_tokens(self, batch: EncoderBatch) -> Tensor:
        """Return the last state of each token of ``batch``. *Shape:* ``[T, L, M]``."""
        assert batch.input_ids is not None
        seqs = self.frontend(batch.input_ids, batch.token_type_ids)
        return self.encoder(seqs, PaddedLayout(seqs, batch.attention_mask))

    def _pool(self, seqs: Tensor) -> Tensor | None:
        """What next sentence prediction pools. *Shape:* ``[T, M]``."""
        if self.head.pooling != "pooler":
            return None
        assert self.pooler is not None
        return torch.tanh(self.pooler(seqs[:, 0]))

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [self.encoder.layers]


def _pooling_mask(batch: EncoderBatch) -> Tensor | None:
    """True for the tokens that the head looks at; ``None`` means all. *Shape:* ``[T, L]``."""
    return batch.attention_mask if batch.pooling_mask is None else batch.pooling_mask


@final
class BertFrontend(Module):
    """Adds word, segment and position embeddings, and normalises them."""

    def __init__(
        self, embed: Embedding, type_embed: Embedding, pos_embed: Embedding, layer_norm: LayerNorm, dropout_p: float
    ) -> None:
        super().__init__()
        self.embed = embed
        self.type_embed = type_embed
        self.pos_embed = pos_embed
        self.layer_norm = layer_norm
        self.dropout = Dropout(dropout_p)

    @override
    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """
        :param input_ids: *Shape:* ``[T, L]``.
        :param token_type_ids: ``None`` means the first segment. *Shape:* ``[T, L]``.
        :returns: *Shape:* ``[T, L, M]``.
        """
        length, max_length = input_ids.size(1), self.pos_embed.num_embeddings
        if length > max_length:
            raise DataError(f"A text has {length} tokens, but the model takes at most {max_length}. Truncate it.")
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = torch.arange(length, device=input_ids.device)
        # In the order in which transformers adds them, for equal rounding.
        seqs = self.embed(input_ids) + self.type_embed(token_type_ids) + self.pos_embed(positions)
        states: Tensor = self.dropout(self.layer_norm(seqs))
        return states

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

"""What all text backbones share: token states, and a head that makes an embedding of them.

Shapes: T texts, L tokens, M model size, D embedding size.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.head import TextHead, head_output_dim
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch, HeadConfig
from vembed_fs2.errors import DataError


class TextBackboneModel(EmbeddingModel):
    """Base of models that turn a text into states of its tokens. Subclasses call :meth:`set_head` last."""

    modalities = frozenset({"text"})

    head: TextHead

    def set_head(self, config: HeadConfig, model_dim: int) -> None:
        """Add what follows the backbone, and say what the embeddings are.

        :param model_dim: the size of a token state.
        """
        self.head = TextHead(config)
        self.embedding_dim = head_output_dim(config, model_dim)
        self.normalize = config.normalize
        self.similarity = "maxsim" if config.pooling == "none" else config.similarity

    @abstractmethod
    def encode_tokens(self, batch: EncoderBatch) -> Tensor:
        """Return the last state of each token of ``batch``. *Shape:* ``[T, L, M]``."""

    def pool_tokens(self, seqs: Tensor) -> Tensor | None:
        """What the backbone's own pooler makes of token states, for the pooling "pooler". *Shape:* ``[T, M]``."""
        return None

    @override
    def encode_text(self, batch: EncoderBatch) -> Tensor:
        """Encode the texts of ``batch``.

        :returns: embeddings, not normalised. *Shape:* ``[T, D]``; ``[T, L, D]`` for the pooling "none".
        :raises DataError: a text is longer than the model can take.
        """
        seqs = self.encode_tokens(batch)
        assert batch.text is not None
        return self.head(seqs, batch.text.pooled_tokens, pooled=self.pool_tokens(seqs))

    @override
    def encode_rows(self, batch: EncoderBatch) -> tuple[Tensor, Tensor | None]:
        """Encode rows; with the pooling "none", each is one text, and the mask says which tokens' vectors count.

        :raises DataError: a row of such a model holds something else than one text.
        """
        if self.head.pooling != "none":
            return super().encode_rows(batch)
        if batch.text is None or batch.images is not None or batch.num_texts != batch.num_rows:
            raise DataError("Each row of a model with several vectors per row must be one text, and no image.")
        mask = batch.text.pooled_tokens
        vectors = self.encode_text(batch)
        return vectors, vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if mask is None else mask.bool()

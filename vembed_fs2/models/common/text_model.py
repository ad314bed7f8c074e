"""What all text backbones share: token states, and a head that makes an embedding of them.

Shapes: T texts, L tokens, M model size.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.head import Head, HeadConfig, States
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch


class TextBackboneModel(EmbeddingModel):
    """Base of models that turn a text into states of its tokens. Subclasses call :meth:`set_head` last."""

    modalities = frozenset({"text"})

    def set_head(self, config: HeadConfig, model_dim: int) -> None:
        """Add what follows the backbone.

        :param model_dim: the size of a token state.
        """
        self.head = Head(config, model_dim)

    @abstractmethod
    def encode_tokens(self, batch: EncoderBatch) -> Tensor:
        """Return the last state of each token of ``batch``. *Shape:* ``[T, L, M]``."""

    def pool_tokens(self, seqs: Tensor) -> Tensor | None:
        """What the backbone's own pooler makes of token states, if the head reads it. *Shape:* ``[T, M]``."""
        return None

    @override
    def encode_text_states(self, batch: EncoderBatch) -> States:
        tokens = self.encode_tokens(batch)
        assert batch.text is not None
        return States(tokens, batch.text.pooled_tokens, self.pool_tokens(tokens))

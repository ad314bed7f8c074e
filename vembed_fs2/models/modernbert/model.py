"""ModernBERT as an embedding model.

Shapes: T texts, L tokens, M model size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from fairseq2.models.transformer import TransformerEncoder
from fairseq2.nn import Embedding, LayerNorm
from torch import Tensor
from torch.nn import Module, ModuleList
from typing_extensions import override

from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.models.common.attention import default_needs_packing, should_pack
from vembed_fs2.models.common.dropout import Dropout
from vembed_fs2.models.common.rotary import (
    PackedRotaryLayout,
    RotaryLayout,
    create_frequencies,
    create_rotation,
)
from vembed_fs2.models.common.text_model import TextBackboneModel


@final
class ModernBertModel(TextBackboneModel):
    """Represents ModernBERT as described in :cite:t:`https://doi.org/10.48550/arxiv.2412.13663`, with pooling on top.

    Texts are packed one after the other where the attention takes no padding,
    and on CPUs where padding is a good part of a batch.
    """

    def __init__(
        self,
        frontend: ModernBertFrontend,
        encoder: TransformerEncoder,
        *,
        head_dim: int,
        global_theta: float,
        local_theta: float,
    ) -> None:
        """
        :param head_dim: the size of an attention head.
        :param global_theta: the base of the rotations in layers that attend to all tokens.
        :param local_theta: the same for layers that attend to near tokens.
        """
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        self.head_dim = head_dim
        self.thetas = (global_theta, local_theta)
        self.needs_packing = default_needs_packing()

    @override
    def encode_tokens(self, batch: EncoderBatch) -> Tensor:
        assert batch.text is not None

        seqs = self.frontend(batch.text.input_ids)
        mask = batch.text.attention_mask
        frequencies = [create_frequencies(self.head_dim, theta, seqs.device) for theta in self.thetas]
        rotations = [create_rotation(seqs.size(1), f) for f in frequencies]
        if mask is not None and should_pack(mask, needed=self.needs_packing):
            layout = PackedRotaryLayout(mask, rotations)
            return layout.pad(self.encoder(layout.pack(seqs), layout))

        return self.encoder(seqs, RotaryLayout(seqs, mask, rotations))

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [self.encoder.layers]


@final
class ModernBertFrontend(Module):
    """Normalises word embeddings; positions come in with the attention."""

    def __init__(self, embed: Embedding, layer_norm: LayerNorm, dropout_p: float) -> None:
        super().__init__()
        self.embed = embed
        self.layer_norm = layer_norm
        self.dropout = Dropout(dropout_p)

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """
        :param input_ids: *Shape:* ``[T, L]``.
        :returns: *Shape:* ``[T, L, M]``.
        """
        states: Tensor = self.dropout(self.layer_norm(self.embed(input_ids)))
        return states

    if TYPE_CHECKING:
        __call__ = forward


@final
class NoNorm(LayerNorm):
    """Stands for the normalisation that the first layer has not: its inputs are normalised already."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x

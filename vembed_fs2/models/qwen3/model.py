"""A decoder as an embedding model.

Shapes: T texts, L tokens, M model size, K size of an attention head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from fairseq2.device import Device
from fairseq2.models.transformer import TransformerEncoder
from fairseq2.nn import Embedding
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typing_extensions import override

from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.models.common.attention import default_needs_packing, should_pack
from vembed_fs2.models.common.rotary import PackedRotaryLayout, RotaryLayout, create_frequencies, create_rotation
from vembed_fs2.models.common.text_model import TextBackboneModel


@final
class Qwen3Model(TextBackboneModel):
    """Represents a decoder such as Qwen3 (:cite:t:`https://doi.org/10.48550/arxiv.2505.09388`), with a head on top.

    ::

        ids [T, L] -> frontend (token embeddings) -> states [T, L, M]
          -> each layer: norm -> attention with rotary positions -> add -> norm -> gated network -> add
          -> norm -> head

    Texts are packed one after the other if the attention takes no padding, and
    on CPUs if padding is a good part of a batch.
    """

    def __init__(
        self,
        frontend: DecoderFrontend,
        decoder: TransformerEncoder,
        *,
        head_dim: int,
        rope_theta: float,
        rope_scaling: Any | None,
    ) -> None:
        """
        :param head_dim: the size of an attention head.
        :param rope_theta: the base of rotary positions.
        :param rope_scaling: how positions are stretched, as a configuration of transformers; ``None`` for not at all.
        """
        super().__init__()
        self.frontend = frontend
        self.decoder = decoder
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.needs_packing = default_needs_packing()

    @override
    def encode_tokens(self, batch: EncoderBatch) -> Tensor:
        assert batch.text is not None

        seqs = self.frontend(batch.text.input_ids)
        mask = batch.text.attention_mask

        rotation = self.create_rotation(seqs.size(1), seqs.device)
        if mask is not None and should_pack(mask, needed=self.needs_packing):
            layout = PackedRotaryLayout(mask, [rotation])
            return layout.pad(self.decoder(layout.pack(seqs), layout))

        return self.decoder(seqs, RotaryLayout(seqs, mask, [rotation]))

    def create_rotation(self, length: int, device: Device) -> Tensor:
        """Return the cosines and sines of positions. *Shape:* ``[2, L, 1, K / 2]``."""
        if self.rope_scaling is None:
            return create_rotation(length, create_frequencies(self.head_dim, self.rope_theta, device))

        kind = self.rope_scaling.rope_scaling["rope_type"]
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](self.rope_scaling, device)
        return create_rotation(length, frequencies, scale)

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [self.decoder.layers]


@final
class DecoderFrontend(Module):
    """Looks token embeddings up; positions come in with the attention."""

    def __init__(self, embed: Embedding) -> None:
        super().__init__()
        self.embed = embed

    @override
    def forward(self, input_ids: Tensor) -> Tensor:
        """
        :param input_ids: *Shape:* ``[T, L]``.
        :returns: *Shape:* ``[T, L, M]``.
        """
        states: Tensor = self.embed(input_ids)
        return states

    if TYPE_CHECKING:
        __call__ = forward

"""A decoder as an embedding model.

Shapes: T texts, L tokens, M model size, K size of an attention head.
"""

from __future__ import annotations

from math import inf
from typing import Any, final

import torch
from fairseq2.device import Device
from fairseq2.models.transformer import TransformerEncoder
from torch import Tensor
from torch.nn import ModuleList
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typing_extensions import override

from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.formats.rope import LENGTH
from vembed_fs2.models.common.attention import default_needs_packing, should_pack
from vembed_fs2.models.common.decoder import DecoderFrontend
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

        rotation = self._rotate(seqs, mask)
        if mask is not None and should_pack(mask, needed=self.needs_packing):
            layout = PackedRotaryLayout(mask, [rotation])
            return layout.pad(self.decoder(layout.pack(seqs), layout))

        return self.decoder(seqs, RotaryLayout(seqs, mask, [rotation]))

    def _rotate(self, seqs: Tensor, mask: Tensor | None) -> Tensor:
        """Return the rotations of all texts, or of each if its length counts.

        :returns: *Shape:* ``[2, L, 1, K / 2]`` or ``[2, T, L, 1, K / 2]``.
        """
        width, device = seqs.size(1), seqs.device
        if mask is None or width <= self._unstretched_length():
            return self.create_rotation(width, width, device)

        # In transformers the longest text of a batch counts; here no text depends on the others.
        return torch.stack([self.create_rotation(width, n, device) for n in mask.sum(1).tolist()], dim=1)

    def _unstretched_length(self) -> float:
        """The length up to which positions are the same in all texts."""
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_scaling["rope_type"] not in ("dynamic", "longrope"):
            return inf
        return int(getattr(scaling, LENGTH, scaling.max_position_embeddings))

    def create_rotation(self, width: int, length: int, device: Device) -> Tensor:
        """Return the cosines and sines of positions.

        :param width: the number of positions.
        :param length: the number of tokens of the text.
        :returns: *Shape:* ``[2, L, 1, K / 2]``.
        """
        if self.rope_scaling is None:
            return create_rotation(width, create_frequencies(self.head_dim, self.rope_theta, device))

        kind = self.rope_scaling.rope_scaling["rope_type"]
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](self.rope_scaling, device, seq_len=length)
        return create_rotation(width, frequencies, scale)

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [self.decoder.layers]

"""Qwen3-VL as an embedding model.

Shapes: N rows, L tokens, M decoder size, S patches of all images, K values of a patch, U tokens of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from fairseq2.models.transformer import AttentionBiasCache
from fairseq2.nn import BatchLayout, LayerNorm
from torch import Tensor
from torch.nn import Module, ModuleList
from typing_extensions import override

from vembed_fs2.embedding.head import Head, HeadConfig, States
from vembed_fs2.embedding.inputs import ImageInputs, Kind, TextInputs
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.models.common.attention import default_needs_packing, should_pack
from vembed_fs2.models.common.decoder import DecoderFrontend
from vembed_fs2.models.common.rotary import PackedRotaryLayout, RotaryLayout, create_frequencies, create_rotation
from vembed_fs2.models.qwen3_vl.positions import number_tokens, rotate_interleaved
from vembed_fs2.models.qwen3_vl.vision import VisionTower


@final
class Qwen3VLModel(EmbeddingModel):
    """Represents Qwen3-VL (https://arxiv.org/abs/2511.21631) with a head on top, as Qwen3-VL-Embedding uses it.

    ::

        patches [S, K] -> vision tower -> tokens [U, M] and, of some layers, what is added below
        ids [N, L] -> token embeddings, an image's tokens in the place of its placeholders -> [N, L, M]
          -> decoder layer 1 -> + states of the vision tower at the images' places (DeepStack) -> layer 2 ...
          -> norm -> head

    A video is a sequence of images.
    """

    modalities = frozenset({"text", "image"})
    is_interleaved = True

    def __init__(
        self,
        frontend: DecoderFrontend,
        vision: VisionTower,
        decoder: DeepStackDecoder,
        *,
        head_dim: int,
        rope_theta: float,
        mrope_section: Sequence[int],
        visual_ids: Sequence[int],
        frame_ids: tuple[int, int],
        patch_dim: int,
    ) -> None:
        """
        :param head_dim: the size of a head of the decoder.
        :param rope_theta: the base of the decoder's rotary positions.
        :param mrope_section: see :func:`~vembed_fs2.models.qwen3_vl.positions.rotate_interleaved`.
        :param visual_ids: the token ids that stand for a part of an image, of images and of videos.
        :param frame_ids: the token ids before and after an image.
        :param patch_dim: the number of values of a patch.
        """
        super().__init__()
        self.frontend = frontend
        self.vision = vision
        self.decoder = decoder
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.mrope_section = list(mrope_section)
        self.visual_ids = list(visual_ids)
        self.frame_ids = frame_ids
        self.patch_dim = patch_dim
        self.needs_packing = default_needs_packing()

    def set_head(self, config: HeadConfig, model_dim: int) -> None:
        """Add what follows the decoder.

        :param model_dim: the size of a state.
        """
        self.head = Head(config, model_dim)

    @override
    def encode_rows(self, batch: EncoderBatch) -> tuple[Tensor, Tensor | None]:
        values, mask, *_ = self.head(self.encode_states(batch))
        return values, mask

    @override
    def encode_text_states(self, batch: EncoderBatch) -> States:
        return self.encode_states(batch)

    def encode_states(self, batch: EncoderBatch) -> States:
        """Return the decoder's last state of each token of each row.

        :raises DataError: a row has no text or several, or other placeholders than its images need.
        """
        text, images = batch.text, batch.images
        if text is None or len(text) != batch.num_rows:
            raise DataError(
                "Each row of a model that reads texts and images together must be one text with placeholders."
            )

        seqs = self.frontend(text.input_ids)
        mask = text.attention_mask

        added: list[Tensor] = []
        visual = self._find_visual(text)
        if images is None:
            if bool(visual.any()):
                raise DataError("A row has placeholders, but no image.")
            rotation, tokens = self._rotate_text(text), None
        else:
            rotation = self._rotate_rows(text, images, visual)
            tokens, added = self.vision(images.values, self._grids_of(images))
            seqs = self._insert(seqs, visual, tokens)

        where = visual.flatten().nonzero().squeeze(1) if tokens is not None else None
        if mask is not None and should_pack(mask, needed=self.needs_packing):
            layout = PackedRotaryLayout(mask, [rotation])
            if where is not None:
                where = visual.flatten().index_select(0, layout.indices).nonzero().squeeze(1)
            states = layout.pad(self.decoder(layout.pack(seqs), layout, where, added))
        else:
            states = self.decoder(seqs, RotaryLayout(seqs, mask, [rotation]), where, added)

        return States(states, text.pooled_tokens, None)

    def _find_visual(self, text: TextInputs) -> Tensor:
        """True for the tokens that stand for a part of an image. *Shape:* ``[N, L]``."""
        ids = torch.tensor(self.visual_ids, device=text.input_ids.device)
        visual = torch.isin(text.input_ids, ids)
        return visual if text.attention_mask is None else visual & text.attention_mask

    def _grids_of(self, images: ImageInputs) -> Tensor:
        if images.grids is None:
            raise DataError("Images must be patches with `grids`.")
        return images.grids

    def _rotate_text(self, text: TextInputs) -> Tensor:
        frequencies = create_frequencies(self.head_dim, self.rope_theta, text.input_ids.device)
        return create_rotation(text.input_ids.size(1), frequencies)

    def _rotate_rows(self, text: TextInputs, images: ImageInputs, visual: Tensor) -> Tensor:
        merged = self._grids_of(images) // torch.tensor([1, self.vision.merge_size, self.vision.merge_size])
        numbers = number_tokens(visual.cpu(), text.num_tokens().tolist(), merged, images.rows.cpu())

        device = text.input_ids.device
        frequencies = create_frequencies(self.head_dim, self.rope_theta, device)
        return rotate_interleaved(numbers.to(device), frequencies, self.mrope_section)

    def _insert(self, seqs: Tensor, visual: Tensor, tokens: Tensor) -> Tensor:
        """Put the tokens of images in the place of their placeholders."""
        where = visual.flatten().nonzero().squeeze(1)
        return seqs.flatten(0, 1).index_copy(0, where, tokens.to(seqs.dtype)).view_as(seqs)

    @override
    def blank(self, kind: Kind) -> EncoderBatch:
        row = torch.zeros(1, dtype=torch.int64)
        if Kind.IMAGE not in kind:
            return EncoderBatch(1, TextInputs(torch.zeros(1, 1, dtype=torch.int64), row))

        # One square of patches, one token.
        size = self.vision.merge_size
        images = ImageInputs(torch.zeros(size * size, self.patch_dim), row, torch.tensor([[1, size, size]]))
        return EncoderBatch(1, TextInputs(torch.tensor([[self.visual_ids[0]]]), row), images)

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [self.vision.layers, self.decoder.layers]


@final
class DeepStackDecoder(Module):
    """Decoder layers; the states of the first ones get something added where images are.

    "DeepStack", Meng et al., 2024, https://arxiv.org/abs/2406.04334.
    """

    def __init__(self, layers: Sequence[Module], layer_norm: LayerNorm) -> None:
        super().__init__()
        self.layers = ModuleList(layers)
        self.layer_norm = layer_norm

    @override
    def forward(self, seqs: Tensor, layout: BatchLayout, where: Tensor | None, added: Sequence[Tensor]) -> Tensor:
        """
        :param seqs: *Shape:* ``[N, L, M]``, or packed ``[tokens, M]``.
        :param where: the tokens of images, of all rows one after the other. *Shape:* ``[U]``.
        :param added: what is added there after the first layers. *Shape:* ``[U, M]`` each.
        :returns: *Shape:* as is ``seqs``.
        """
        bias_cache = AttentionBiasCache()

        for idx, layer in enumerate(self.layers):
            seqs = layer(seqs, layout, bias_cache)
            if where is not None and idx < len(added):
                flat = seqs.reshape(-1, seqs.size(-1))
                seqs = flat.index_add(0, where, added[idx].to(flat.dtype)).view_as(seqs)

        states: Tensor = self.layer_norm(seqs)
        return states

    if TYPE_CHECKING:
        __call__ = forward

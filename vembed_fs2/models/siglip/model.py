"""SigLIP: a text and an image Transformer that share an embedding space, for the sigmoid loss.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023,
https://arxiv.org/abs/2303.15343; Tschannen et al., "SigLIP 2: Multilingual
Vision-Language Encoders with Improved Semantic Understanding, Localization, and
Dense Features", 2025, https://arxiv.org/abs/2502.14786.

Shapes: T texts, P images, L tokens, S patches, K values of a patch, M model
size, D embedding size, C x H x W pixels, h x w patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isqrt
from typing import TYPE_CHECKING, final

import torch
import torch.nn as nn
from fairseq2.models.transformer import (
    AttentionBiasCache,
    FeedForwardNetwork,
    MultiheadAttention,
    StandardTransformerEncoder,
)
from fairseq2.nn import BatchLayout, LayerNorm, Linear, Projection, StandardEmbedding
from torch import Tensor
from torch.nn import Module, ModuleList, Parameter
from torch.nn.functional import pad
from typing_extensions import override

from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.head import Head, HeadConfig, States
from vembed_fs2.embedding.inputs import ImageInputs
from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE, LearnedPart
from vembed_fs2.embedding.model import EmbeddingModel, Modality
from vembed_fs2.errors import DataError
from vembed_fs2.models.common.attention import PaddedLayout
from vembed_fs2.models.common.dual import TextFrontend, counted_tokens
from vembed_fs2.models.common.vision import PatchProjection, resize_positions


@final
class SiglipTextTower(Module):
    """A Transformer; the state of the last position, which may be padding, is the text."""

    def __init__(
        self, frontend: TextFrontend, encoder: StandardTransformerEncoder, proj: Projection, pad_id: int
    ) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        self.proj = proj
        self.pad_id = pad_id

    @override
    def forward(self, ids_TL: Tensor, mask_TL: Tensor | None, head: HeadConfig) -> States:
        """Encode texts; return what ``head`` reads, projected: token states ``[T, L, D]``, the text's ``[T, D]``.

        :param mask_TL: True for tokens; ``None`` if padding is not masked, as in training of the public models.
        :raises DataError: a text is longer than the position table.
        """
        length, max_length = ids_TL.size(1), self.frontend.pos_embed.num_embeddings
        if length > max_length:
            raise DataError(f"A text has {length} tokens, but the model takes at most {max_length}. Truncate it.")

        seqs_TLM, layout = self.frontend(ids_TL, PaddedLayout(ids_TL, mask_TL))
        seqs_TLM = self.encoder(seqs_TLM, layout)
        tokens_TLD = self.proj(seqs_TLM) if head.reads_states else None

        return States(tokens_TLD, None, self.proj(seqs_TLM[:, -1]) if head.reads_pooler else None)

    if TYPE_CHECKING:
        __call__ = forward

    def fill(self, ids_TL: Tensor, mask_TL: Tensor) -> tuple[Tensor, Tensor]:
        """Pad texts to the longest there can be: what the last position reads must not depend on the batch."""
        missing = max(self.frontend.pos_embed.num_embeddings - ids_TL.size(1), 0)
        ids_TL = ids_TL.masked_fill(~mask_TL, self.pad_id)
        return pad(ids_TL, (0, missing), value=self.pad_id), pad(mask_TL, (0, missing))


class SiglipFrontend(Module, ABC):
    """Makes the inputs of the image Transformer: patches, and the positions that are added to them."""

    def __init__(self, patch_proj: Module, pos_embed: StandardEmbedding) -> None:
        super().__init__()
        self.patch_proj = patch_proj
        self.pos_embed = pos_embed

    @abstractmethod
    @override
    def forward(self, batch: EncoderBatch) -> tuple[Tensor, PaddedLayout]:
        """Return the inputs of the Transformer, ``[P, S, M]``, and where they are padding."""

    if TYPE_CHECKING:
        __call__ = forward


@final
class SiglipImageFrontend(SiglipFrontend):
    """Cuts images of one size into patches and adds positions."""

    patch_proj: PatchProjection

    @override
    def forward(self, batch: EncoderBatch) -> tuple[Tensor, PaddedLayout]:
        assert batch.images is not None

        x_PCHW = batch.images.values
        if x_PCHW.ndim != 4:
            raise DataError(f"Pixel values must be of shape [P, C, H, W], but are {list(x_PCHW.shape)}.")

        x_PMhw = self.patch_proj(x_PCHW)
        positions_SM = resize_positions(_grid(self.pos_embed), x_PMhw.size(2), x_PMhw.size(3))
        seqs_PSM = x_PMhw.flatten(2).transpose(1, 2) + positions_SM

        return seqs_PSM, PaddedLayout(seqs_PSM, None)


@final
class SiglipPatchFrontend(SiglipFrontend):
    """Adds positions to images of any size, which are cut into patches already (NaFlex)."""

    patch_proj: Linear

    @override
    def forward(self, batch: EncoderBatch) -> tuple[Tensor, PaddedLayout]:
        images, patch_dim = batch.images, self.patch_proj.input_dim
        assert images is not None

        if images.grids is None or images.values.size(1) != patch_dim:
            raise DataError(
                f"Images must be cut into patches of {patch_dim} values, but are of shape {list(images.values.shape)}. "
                "The `patch_size` of the image processor must equal the model's."
            )

        x_PSK, mask_PS = images.pad_patches()
        patches_PSM = self.patch_proj(x_PSK.to(self.patch_proj.weight.dtype))
        seqs_PSM = patches_PSM + self._positions(images.grids[:, 1:], x_PSK.size(1))

        return seqs_PSM, PaddedLayout(seqs_PSM, mask_PS)

    def _positions(self, shapes_P2: Tensor, width: int) -> Tensor:
        """The positions of each image, interpolated from the grid that is learned. *Returns:* ``[P, S, M]``."""
        shapes = [(int(h), int(w)) for h, w in shapes_P2.tolist()]
        grid_hwM = _grid(self.pos_embed)

        # Images of one shape share their positions.
        tables = {
            (h, w): pad(resize_positions(grid_hwM, h, w, mode="bilinear", antialias=True), (0, 0, 0, width - h * w))
            for h, w in dict.fromkeys(shapes)
        }

        return torch.stack([tables[shape] for shape in shapes])


def _grid(pos_embed: StandardEmbedding) -> Tensor:
    """The positions in rows and columns. *Returns:* ``[h, w, M]``."""
    side = isqrt(pos_embed.num_embeddings)
    return pos_embed.weight.view(side, side, -1)


@final
class SiglipAttentionPool(Module):
    """Reads the states of an image by attention, with one query that is learned (MAP head)."""

    def __init__(
        self, model_dim: int, attention: MultiheadAttention, layer_norm: LayerNorm, ffn: FeedForwardNetwork
    ) -> None:
        super().__init__()
        self.probe = Parameter(torch.empty(1, 1, model_dim))
        self.attention = attention
        self.layer_norm = layer_norm
        self.ffn = ffn
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.probe)

    @override
    def forward(self, seqs_PSM: Tensor, layout: BatchLayout) -> Tensor:
        """Return ``[P, M]``."""
        probe_P1M = self.probe.expand(seqs_PSM.size(0), -1, -1)
        state_P1M = self.attention(
            probe_P1M,
            PaddedLayout(probe_P1M, None),
            keys=seqs_PSM,
            keys_layout=layout,
            values=seqs_PSM,
            bias_cache=AttentionBiasCache(),
        )
        return (state_P1M + self.ffn(self.layer_norm(state_P1M))).squeeze(1)

    if TYPE_CHECKING:
        __call__ = forward


@final
class SiglipVisionTower(Module):
    """A Vision Transformer without a class token, pooled by attention."""

    def __init__(
        self,
        frontend: SiglipFrontend,
        encoder: StandardTransformerEncoder,
        head: SiglipAttentionPool,
    ) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        self.head = head

    @override
    def forward(self, batch: EncoderBatch, head: HeadConfig) -> States:
        """Encode the images of ``batch``; return what ``head`` reads: patch states ``[P, S, D]``, the image's."""
        seqs_PSM, layout = self.frontend(batch)
        seqs_PSM = self.encoder(seqs_PSM, layout)
        return States(seqs_PSM, layout.mask, self.head(seqs_PSM, layout) if head.reads_pooler else None)

    if TYPE_CHECKING:
        __call__ = forward


@final
class SiglipModel(EmbeddingModel):
    """A SigLIP model: unnormalised embeddings of texts, of images, or of both."""

    text_padding = "max_length"

    def __init__(
        self,
        text: SiglipTextTower | None,
        vision: SiglipVisionTower | None,
        logit_scale_init: float | None,
        logit_bias_init: float | None,
        head: HeadConfig | None = None,
    ) -> None:
        """
        :param logit_scale_init: The initial log inverse temperature; ``None`` if the model has none.
        :param logit_bias_init: The initial bias of the logits; ``None`` if the model has none.
        :param head: the head after the towers; ``None`` for their own poolings.
        """
        super().__init__()
        self.text: SiglipTextTower | None
        self.vision: SiglipVisionTower | None
        self.register_module("text", text)
        self.register_module("vision", vision)

        embedding_dim, modalities = 0, set[Modality]()
        if vision is not None:
            embedding_dim = vision.frontend.pos_embed.embed_dim
            modalities.add("image")

        if text is not None:
            embedding_dim = text.proj.output_dim
            self.max_text_length = text.frontend.pos_embed.num_embeddings
            self.vocab_size = text.frontend.embed.num_embeddings
            modalities.add("text")

        self.modalities = frozenset(modalities)
        if len(modalities) > 1:
            self.towers = {"text": ["text"], "image": ["vision"]}

        self.head = Head(head or HeadConfig(pooling="pooler"), embedding_dim)
        inits = ((LOGIT_SCALE, logit_scale_init), (LOGIT_BIAS, logit_bias_init))
        self.add_learned_parts([LearnedPart(name=name, mean=init) for name, init in inits if init is not None])

    @override
    def encode_text_states(self, batch: EncoderBatch) -> States:
        """Encode the texts of ``batch``.

        Texts with a mask are padded to ``max_text_length`` first, unless
        ``fixed_width`` says that they are padded already. Texts without one are
        taken as they are: pad them as the model was trained.

        :raises DataError: a text is longer than the position table.
        """
        if self.text is None:
            return super().encode_text_states(batch)

        assert batch.text is not None

        ids_TL, mask_TL = batch.text.input_ids, batch.text.attention_mask
        if mask_TL is not None and not batch.text.fixed_width:
            ids_TL, mask_TL = self.text.fill(ids_TL, mask_TL.bool())

        states = self.text(ids_TL, mask_TL, self.head.config)
        return states._replace(mask=counted_tokens(batch.text, ids_TL.size(1)))

    @override
    def encode_image_states(self, batch: EncoderBatch) -> States:
        """Encode the images of ``batch``, of any size of at least one patch.

        :raises DataError: the images are not of the shape that the model takes.
        """
        if self.vision is None:
            return super().encode_image_states(batch)
        return self.vision(batch, self.head.config)

    @override
    def blank_image(self) -> ImageInputs:
        if self.vision is None or not isinstance(self.vision.frontend, SiglipPatchFrontend):
            return super().blank_image()

        patch = torch.zeros(1, self.vision.frontend.patch_proj.input_dim)
        return ImageInputs(patch, torch.zeros(1, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [tower.encoder.layers for tower in (self.text, self.vision) if tower is not None]

"""CLIP: a text and an image Transformer that share an embedding space.

Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021, https://arxiv.org/abs/2103.00020.

Shapes: T texts, P images, L tokens, S patches and class token, M model size,
D embedding size, C x H x W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, final

import torch
import torch.nn as nn
from fairseq2.models.transformer import StandardTransformerEncoder
from fairseq2.nn import LayerNorm, Projection, StandardEmbedding
from torch import Tensor
from torch.nn import Conv2d, Module, ModuleList, Parameter
from torch.nn.functional import pad
from typing_extensions import override

from vembed_fs2.embedding.head import Head, HeadConfig, States, pool
from vembed_fs2.embedding.learned import LOGIT_SCALE, LearnedPart
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.models.common.attention import PaddedLayout
from vembed_fs2.models.common.dual import TextFrontend, counted_tokens
from vembed_fs2.models.common.vision import resize_positions

TextPooling: TypeAlias = Literal["clip", "eos", "first", "last"]

VisionPooling: TypeAlias = Literal["cls", "mean"]

LEGACY_EOS_ID: Final = 2
"""The end token that old configurations name, whatever the tokenizer's is."""


@final
class ClipTextTower(Module):
    """A Transformer, causal in most models; the state of one position is the text."""

    def __init__(
        self,
        frontend: TextFrontend,
        encoder: StandardTransformerEncoder,
        proj: Projection,
        eos_id: int,
        *,
        pooling: TextPooling = "clip",
        pad_id: int | None = None,
    ) -> None:
        """
        :param pooling: which position; see :class:`~vembed_fs2.models.clip.ClipTextConfig`.
        :param pad_id: the token that fills each text up to the full length, if the model sees padding; else ``None``.
        """
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        self.proj = proj
        self.eos_id = eos_id
        self.pooling = pooling
        self.pad_id = pad_id

    @override
    def forward(self, ids_TL: Tensor, mask_TL: Tensor | None, head: HeadConfig) -> States:
        """Encode texts; return what ``head`` reads, projected: token states ``[T, L, D]``, the text's ``[T, D]``.

        :param mask_TL: True for tokens, which come before the padding. It only
            keeps padding from being taken for the end token: causal attention
            never looks at what follows. Models that see padding have no mask.
        """
        max_length = self.frontend.pos_embed.num_embeddings
        if ids_TL.size(1) > max_length:
            raise ValueError(f"Texts must have at most {max_length} tokens, but one has {ids_TL.size(1)} instead.")
        if self.pad_id is not None:
            ids_TL, mask_TL = _fill(ids_TL, mask_TL, max_length, self.pad_id), None

        seqs_TLM, layout = self.frontend(ids_TL, PaddedLayout(ids_TL, None))
        seqs_TLM = self.encoder(seqs_TLM, layout)
        tokens_TLD = self.proj(seqs_TLM) if head.reads_states else None
        pooled_TD = self.proj(self._pool(seqs_TLM, ids_TL, mask_TL)) if head.reads_pooler else None

        return States(tokens_TLD, None, pooled_TD)

    def _pool(self, seqs_TLM: Tensor, ids_TL: Tensor, mask_TL: Tensor | None) -> Tensor:
        """The state that stands for each text. *Returns:* ``[T, M]``."""
        if self.pooling == "first":
            return seqs_TLM[:, 0]
        if self.pooling == "last":
            return seqs_TLM[:, -1]

        rows = torch.arange(ids_TL.size(0), device=ids_TL.device, dtype=torch.int64)
        return seqs_TLM[rows, self._end_positions(ids_TL, mask_TL)]

    def _end_positions(self, ids_TL: Tensor, mask_TL: Tensor | None) -> Tensor:
        # The padding token may be the end token or may sit above it, so padding does not take part.
        if self.pooling == "clip" and self.eos_id == LEGACY_EOS_ID:
            score_TL = ids_TL if mask_TL is None else ids_TL.masked_fill(~mask_TL, -1)
        else:
            is_end_TL = ids_TL == self.eos_id
            score_TL = (is_end_TL if mask_TL is None else is_end_TL & mask_TL).int()
        return score_TL.argmax(1)

    if TYPE_CHECKING:
        __call__ = forward


def _fill(ids_TL: Tensor, mask_TL: Tensor | None, length: int, pad_id: int) -> Tensor:
    """Make the padding, and what is missing to the full length, the padding token. *Returns:* ``[T, length]``."""
    if mask_TL is not None:
        ids_TL = ids_TL.masked_fill(~mask_TL, pad_id)
    return pad(ids_TL, (0, length - ids_TL.size(1)), value=pad_id)


@final
class ClipVisionFrontend(Module):
    """Cuts images into patches, puts the class token before them, adds positions and normalises."""

    def __init__(
        self,
        patch_proj: Conv2d,
        pos_embed: StandardEmbedding,
        layer_norm: LayerNorm | None,
        std: float,
        *,
        grid: tuple[int, int],
        patch_dropout_p: float = 0.0,
    ) -> None:
        """
        :param std: the standard deviation of the initial class token.
        :param grid: the rows and columns of patches that the positions belong to.
        :param patch_dropout_p: the part of the patches that each image does without in training
            (Li et al., FLIP, 2022, https://arxiv.org/abs/2212.00794).
        """
        super().__init__()
        self.class_embed = Parameter(torch.empty(pos_embed.embed_dim))
        self.patch_proj = patch_proj
        self.pos_embed = pos_embed
        self.layer_norm: LayerNorm | None
        self.register_module("layer_norm", layer_norm)
        self.grid = grid
        self.patch_dropout_p = patch_dropout_p
        self._std = std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.class_embed, std=self._std)

    @override
    def forward(self, x_PCHW: Tensor) -> Tensor:
        """Return the inputs of the Transformer, ``[P, S, M]``."""
        x_PMhw = self.patch_proj(x_PCHW.to(self.patch_proj.weight.dtype))
        positions_SM = self._positions(x_PMhw.size(2), x_PMhw.size(3))
        class_P1M = self.class_embed.expand(x_PMhw.size(0), 1, -1)

        seqs_PSM = torch.cat([class_P1M, x_PMhw.flatten(2).transpose(1, 2)], dim=1) + positions_SM
        if self.training and self.patch_dropout_p > 0.0:
            seqs_PSM = self._drop_patches(seqs_PSM)

        return seqs_PSM if self.layer_norm is None else self.layer_norm(seqs_PSM)

    def _positions(self, height: int, width: int) -> Tensor:
        """Positions of a grid of ``height`` x ``width`` patches, resized from the trained grid if that differs."""
        table_SM = self.pos_embed.weight
        if (height, width) == self.grid:
            return table_SM

        grid_hwM = table_SM[1:].reshape(*self.grid, -1)
        return torch.cat([table_SM[:1], resize_positions(grid_hwM, height, width)])

    def _drop_patches(self, seqs_PSM: Tensor) -> Tensor:
        """Keep the class token and a random choice of the patches of each image, in any order."""
        num_images, size, model_dim = seqs_PSM.shape
        num_kept = max(1, int((size - 1) * (1.0 - self.patch_dropout_p)))
        draws_PS = torch.rand((num_images, size - 1), device=seqs_PSM.device, dtype=torch.float32)
        index_PS = draws_PS.topk(num_kept, dim=1).indices + 1
        patches_PSM = seqs_PSM.gather(1, index_PS.unsqueeze(2).expand(-1, -1, model_dim))

        return torch.cat([seqs_PSM[:, :1], patches_PSM], dim=1)

    if TYPE_CHECKING:
        __call__ = forward


class VisionTower(Module, ABC):
    """An image Transformer that projects to the space of a :class:`ClipModel`."""

    encoder: StandardTransformerEncoder

    @abstractmethod
    @override
    def forward(self, x_PCHW: Tensor, head: HeadConfig) -> States:
        """Encode images of any size; return what ``head`` reads, projected.

        Class token and patches have states ``[P, S, D]``, and the image has one of its own, ``[P, D]``.
        """

    if TYPE_CHECKING:
        __call__ = forward


@final
class ClipVisionTower(VisionTower):
    """A Vision Transformer; the state of the class token, or the mean of the patches', is the image."""

    def __init__(
        self,
        frontend: ClipVisionFrontend,
        encoder: StandardTransformerEncoder,
        layer_norm: LayerNorm,
        proj: Projection,
        *,
        pooling: VisionPooling = "cls",
        norm_after_pooling: bool = True,
    ) -> None:
        super().__init__()
        self.frontend = frontend
        self.encoder = encoder
        self.layer_norm = layer_norm
        self.proj = proj
        self.pooling = pooling
        self.norm_after_pooling = norm_after_pooling

    @override
    def forward(self, x_PCHW: Tensor, head: HeadConfig) -> States:
        seqs_PSM = self.frontend(x_PCHW)
        seqs_PSM = self.encoder(seqs_PSM, PaddedLayout(seqs_PSM, None))
        tokens_PSD = self.proj(self.layer_norm(seqs_PSM)) if head.reads_states else None
        pooled_PD = self.proj(self._pool(seqs_PSM)) if head.reads_pooler else None
        return States(tokens_PSD, None, pooled_PD, num_prefix_tokens=1)

    def _pool(self, seqs_PSM: Tensor) -> Tensor:
        """The normalised state that stands for each image. *Returns:* ``[P, M]``."""
        if self.pooling == "cls":
            return self.layer_norm(seqs_PSM[:, 0])
        if self.norm_after_pooling:
            return self.layer_norm(pool(seqs_PSM[:, 1:], None, "mean"))
        return pool(self.layer_norm(seqs_PSM[:, 1:]), None, "mean")

    if TYPE_CHECKING:
        __call__ = forward


class ClipModel(EmbeddingModel):
    """A CLIP model: unnormalised, projected embeddings of texts and images."""

    modalities = frozenset({"text", "image"})

    def __init__(
        self,
        text: ClipTextTower,
        vision: VisionTower,
        logit_scale_init: float,
        train_logit_scale: bool,
        head: HeadConfig | None = None,
    ) -> None:
        """
        :param logit_scale_init: The initial log inverse temperature.
        :param train_logit_scale: If ``False``, it is a buffer, which no recipe can train by accident.
        :param head: the head after the towers; ``None`` for their own poolings.
        """
        super().__init__()
        self.text = text
        self.vision = vision
        self.towers = {"text": ["text"], "image": ["vision"]}
        self.head = Head(head or HeadConfig(pooling="pooler"), text.proj.output_dim)
        self.max_text_length = text.frontend.pos_embed.num_embeddings
        self.vocab_size = text.frontend.embed.num_embeddings
        self.add_learned_parts([LearnedPart(name=LOGIT_SCALE, mean=logit_scale_init, is_trained=train_logit_scale)])

    @override
    def encode_text_states(self, batch: EncoderBatch) -> States:
        """Encode the texts of ``batch``.

        Texts must hold the end token of the configuration, as CLIP's tokenizers
        write it; like in transformers, the first token stands for a text without.
        """
        text = batch.text
        assert text is not None
        states = self.text(text.input_ids, text.attention_mask, self.head.config)
        return states if states.tokens is None else states._replace(mask=counted_tokens(text, states.tokens.size(1)))

    @override
    def encode_image_states(self, batch: EncoderBatch) -> States:
        """Encode the images of ``batch``, of any size of at least one patch."""
        assert batch.images is not None
        return self.vision(batch.images.values, self.head.config)

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [self.text.encoder.layers, self.vision.encoder.layers]

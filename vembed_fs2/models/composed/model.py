"""A text and an image encoder of any families, projected to one embedding space.

With a locked image encoder this is Zhai et al., "LiT: Zero-Shot Transfer with
Locked-image text Tuning", 2022, https://arxiv.org/abs/2111.07991.

Shapes: T texts, P images, M size of an encoder's own embeddings, D embedding size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, final

import torch.nn as nn
from fairseq2.nn import Linear
from torch import Tensor
from torch.nn import Module, ModuleList
from typing_extensions import Self, override

from vembed_fs2.embedding.freezing import plain_name, stop_dropout
from vembed_fs2.embedding.head import Head, States
from vembed_fs2.embedding.inputs import ImageInputs
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch, Modality
from vembed_fs2.models.common.dropout import Dropout
from vembed_fs2.models.composed.backbone import TowerEncoder

MODALITIES: Final[tuple[Modality, ...]] = ("text", "image")


@final
class Projection(Module):
    """A linear map, with a hidden layer before it or without."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        hidden_dim: int | None,
        *,
        activation: Module,
        bias: bool,
        dropout_p: float,
    ) -> None:
        """
        :param hidden_dim: the size of the hidden layer; ``None`` if there is none.
        """
        super().__init__()

        self.inner_proj: Linear | None = None
        self.activation: Module | None = None
        if hidden_dim is not None:
            self.inner_proj = Linear(input_dim, hidden_dim, bias, init_fn=_init_projection)
            self.activation = activation

        self.dropout = Dropout(dropout_p)
        self.output_proj = Linear(hidden_dim or input_dim, output_dim, bias, init_fn=_init_projection)

    @override
    def forward(self, x_NM: Tensor) -> Tensor:
        """Project embeddings. *Returns:* ``[N, D]``."""
        if self.inner_proj is not None and self.activation is not None:
            x_NM = self.activation(self.inner_proj(x_NM))
        return self.output_proj(self.dropout(x_NM))

    if TYPE_CHECKING:
        __call__ = forward


def _init_projection(proj: Linear) -> None:
    # As CLIP does: embeddings keep their length on average.
    nn.init.normal_(proj.weight, std=proj.input_dim**-0.5)
    if proj.bias is not None:
        nn.init.zeros_(proj.bias)


@final
class Tower(Module):
    """An encoder of texts or images, and the projection of its embeddings."""

    def __init__(
        self, backbone: TowerEncoder, projection: Module, frozen: frozenset[str], source: str | Path | None
    ) -> None:
        """
        :param frozen: the names of the encoder's parameters that keep their values.
        :param source: the folder or card that the encoder's initial weights come from.
        """
        super().__init__()
        self.backbone = backbone.model
        self.projection = projection
        self.family = backbone.family
        self.config = backbone.config
        self.stacks = backbone.stacks
        self.left_out = backbone.left_out
        self._constants = backbone.constants
        self.frozen = frozen
        self.source = source

    def reset_non_persistent_buffers(self) -> None:
        """Set the buffers that no checkpoint has and that the encoder does not set itself."""
        for name, buffer in self.backbone.named_buffers():
            if (value := self._constants.get(plain_name(name))) is not None:
                buffer.copy_(value)

    @override
    def train(self, mode: bool = True) -> Self:
        """As of any module; but what is frozen has no dropout."""
        super().train(mode)
        stop_dropout(self.backbone, self.frozen)
        return self

    def project_vectors(self, states: States) -> States:
        """Project the vectors of a multi-vector encoder, each one."""
        vectors, mask = self.backbone.head(states)
        return States(self.projection(vectors), mask)

    def layer_stacks(self) -> list[ModuleList]:
        """The encoder's stacks of layers."""
        # By name: without its other tower, the encoder itself may not find them.
        stacks = [self.backbone.get_submodule(name) for name in self.stacks]
        return [stack for stack in stacks if isinstance(stack, ModuleList)]


@final
class ComposedModel(EmbeddingModel):
    """A text and an image encoder: unnormalised, projected embeddings of texts and images."""

    modalities = frozenset({"text", "image"})

    def __init__(self, text: Tower, image: Tower, head: Head) -> None:
        super().__init__()
        self.text = text
        self.image = image
        self.towers = {"text": ["text"], "image": ["image"]}
        self.head = head
        self.max_text_length = text.backbone.max_text_length
        self.vocab_size = text.backbone.vocab_size
        self.text_padding = text.backbone.text_padding
        self.tokens_per_image = image.backbone.tokens_per_image
        towers = {"text": text, "image": image}
        self.frozen_parameters = frozenset(f"{k}.backbone.{name}" for k, t in towers.items() for name in t.frozen)
        self.requires_grad_(True)

    @override
    def blank_image(self) -> ImageInputs:
        return self.image.backbone.blank_image()

    @override
    def encode_text_states(self, batch: EncoderBatch) -> States:
        backbone = self.text.backbone
        if self.is_multi_vector:
            return self.text.project_vectors(backbone.encode_text_states(batch))
        return States(pooled=self.text.projection(backbone.encode_text(batch)))

    @override
    def encode_image_states(self, batch: EncoderBatch) -> States:
        backbone = self.image.backbone
        if self.is_multi_vector:
            return self.image.project_vectors(backbone.encode_image_states(batch))
        return States(pooled=self.image.projection(backbone.encode_image(batch)))

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return [*self.text.layer_stacks(), *self.image.layer_stacks()]

"""A model of transformers, as it is, as an embedding model.

Shapes: T texts, P images, L tokens, S states, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import Conv2d, Module, ModuleList, Parameter
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from vembed_fs2.embedding.head import TextHead
from vembed_fs2.embedding.image_head import ImageHead
from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE, LearnedPart
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.models.auto.backbone import Backbone
from vembed_fs2.models.auto.run import run_image, run_text

MOVED: Final = (LOGIT_SCALE, LOGIT_BIAS)
"""Parameters of transformers' dual encoders that are this model's own: objectives train them."""

_WRAPPER: Final = "_checkpoint_wrapped_module."
"""What activation checkpointing puts into the names of buffers."""


@final
class AutoEmbeddingModel(EmbeddingModel):
    """Wraps a model of transformers.

    Batch normalisation always uses its running statistics: an embedding must
    not depend on the batch that the input is in.
    """

    def __init__(self, wrapped: Module, backbone: Backbone) -> None:
        super().__init__()
        self.modalities = backbone.modalities
        self.max_text_length = backbone.max_text_length
        self._backbone = backbone
        _fix_statistics(wrapped)
        _reshape_scalars(wrapped)
        self.wrapped = wrapped
        self._take_temperature(wrapped)
        self.head: TextHead | None
        self.register_module("head", None)
        self.image_head: ImageHead | None
        self.register_module("image_head", None)
        self._stacks: list[ModuleList] = []
        self.constants: Mapping[str, Tensor] = {}
        """The values of the buffers of the wrapped model that no checkpoint has, by name, if they are to be set."""

    def reset_non_persistent_buffers(self) -> None:
        """Set the buffers that no checkpoint has."""
        for name, buffer in self.wrapped.named_buffers():
            if (value := self.constants.get(name.replace(_WRAPPER, ""))) is not None:
                buffer.copy_(value)

    def _take_temperature(self, wrapped: Module) -> None:
        for name in MOVED:
            parameter = getattr(wrapped, name, None)
            if isinstance(parameter, Parameter) and parameter.numel() == 1:
                delattr(wrapped, name)
                self.add_learned_parts([LearnedPart(name=name)])
                setattr(self, name, Parameter(parameter.detach().reshape(1)))

    def set_layer_stacks(self, stacks: Sequence[ModuleList]) -> None:
        """Say which lists of modules are the layers."""
        self._stacks = list(stacks)

    @override
    def layer_stacks(self) -> list[ModuleList]:
        return self._stacks

    @override
    def encode_text(self, batch: EncoderBatch) -> Tensor:
        """Encode the texts of ``batch``.

        :returns: embeddings, not normalised. *Shape:* ``[T, D]``; ``[T, L, D]`` for the pooling "none".
        :raises DataError: a text is longer than the model can take.
        """
        text = batch.text
        if text is None or "text" not in self.modalities:
            return super().encode_text(batch)

        ids = text.input_ids
        if self.max_text_length is not None and ids.size(1) > self.max_text_length:
            length = f"A text has {ids.size(1)} tokens, but the model takes at most {self.max_text_length}."
            raise DataError(f"{length} Truncate it.")
        outputs = run_text(self.wrapped, self._backbone, ids, text.attention_mask, text.token_type_ids)
        if self.head is None:
            assert outputs.pooled is not None
            return outputs.pooled
        states = outputs.pooled if outputs.states is None else outputs.states
        assert states is not None
        return self.head(states, text.pooled_tokens, pooled=outputs.pooled)

    @override
    def encode_image(self, batch: EncoderBatch) -> Tensor:
        """Encode the images of ``batch``. *Returns:* ``[P, D]``; ``[P, S, D]`` for the pooling "none"."""
        if batch.images is None or "image" not in self.modalities:
            return super().encode_image(batch)
        pixels = batch.images.values.to(self._input_dtype())
        outputs = run_image(self.wrapped, self._backbone, pixels)
        if self.image_head is None:
            assert outputs.pooled is not None
            return outputs.pooled
        states = outputs.pooled if outputs.states is None else outputs.states
        assert states is not None
        return self.image_head(states, pooled=outputs.pooled)

    def _input_dtype(self) -> torch.dtype:
        """The type of what reads pixels. Not of any parameter: FSDP2 converts those of a layer when it runs."""
        first: Any = next((m for m in self.wrapped.modules() if isinstance(m, Conv2d)), None)
        return next((first or self.wrapped).parameters()).dtype

    @override
    def encode_rows(self, batch: EncoderBatch) -> tuple[Tensor, Tensor | None]:
        """Encode rows; with the pooling "none", each is one text or one image.

        :raises DataError: a row of such a model holds something else.
        """
        if self.similarity != "maxsim":
            return super().encode_rows(batch)
        reads_texts = "text" in self.modalities
        own, other = (batch.num_texts, batch.num_images) if reads_texts else (batch.num_images, batch.num_texts)
        if own != batch.num_rows or other != 0:
            kind = "text" if reads_texts else "image"
            raise DataError(f"Each row of a model with several vectors per row must be one {kind}, and nothing else.")
        vectors = self.encode_text(batch) if reads_texts else self.encode_image(batch)
        mask = None if batch.text is None else batch.text.pooled_tokens
        return vectors, vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


@final
class FixedBatchNorm(Module):
    """Batch normalisation by running statistics, in training as well.

    Not torch's own class in evaluation mode: fairseq2 replaces that by one of
    its own under DDP and FSDP2, which loses track of the parameters.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    @override
    def forward(self, x: Tensor) -> Tensor:
        mean, var, weight, bias = (getattr(self, n) for n in ("running_mean", "running_var", "weight", "bias"))
        return batch_norm(x, mean, var, weight, bias, training=False, eps=self.eps)


def _fix_statistics(wrapped: Module) -> None:
    for parent in list(wrapped.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, FixedBatchNorm(child))


def _reshape_scalars(wrapped: Module) -> None:
    """Give scalars one dimension: FSDP2 can neither shard nor save them otherwise."""
    for module in wrapped.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 0:
                module._parameters[name] = Parameter(parameter.detach().reshape(1), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.ndim == 0 and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.reshape(1)

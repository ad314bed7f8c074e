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

from vembed_fs2.embedding.head import States
from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE, LearnedPart
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.models.auto.backbone import Backbone
from vembed_fs2.models.auto.run import run_image, run_text

OWN_PARAMETERS: Final = (LOGIT_SCALE, LOGIT_BIAS)
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
        self.vocab_size = backbone.vocab_size
        self.backbone = backbone
        _fix_statistics(wrapped)
        _reshape_scalars(wrapped)
        self.wrapped = wrapped
        self._take_temperature(wrapped)
        self.num_prefix_tokens = 0
        """The number of an image's states before its patches' states."""
        self._stacks: list[ModuleList] = []
        self.constants: Mapping[str, Tensor] = {}
        """The values of the buffers of the wrapped model that no checkpoint has, by name, if they are to be set."""

    def reset_non_persistent_buffers(self) -> None:
        """Set the buffers that no checkpoint has."""
        for name, buffer in self.wrapped.named_buffers():
            if (value := self.constants.get(name.replace(_WRAPPER, ""))) is not None:
                buffer.copy_(value)

    def _take_temperature(self, wrapped: Module) -> None:
        for name in OWN_PARAMETERS:
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
    def encode_text_states(self, batch: EncoderBatch) -> States:
        text = batch.text
        if text is None or "text" not in self.modalities:
            return super().encode_text_states(batch)

        ids = text.input_ids
        if self.max_text_length is not None and ids.size(1) > self.max_text_length:
            length = f"A text has {ids.size(1)} tokens, but the model takes at most {self.max_text_length}."
            raise DataError(f"{length} Truncate it.")

        outputs = run_text(self.wrapped, self.backbone, ids, text.attention_mask, text.token_type_ids)
        return States(outputs.states, text.pooled_tokens, outputs.pooled)

    @override
    def encode_image_states(self, batch: EncoderBatch) -> States:
        if batch.images is None or "image" not in self.modalities:
            return super().encode_image_states(batch)
        outputs = run_image(self.wrapped, self.backbone, batch.images.values.to(self._input_dtype()))
        return States(outputs.states, None, outputs.pooled, self.num_prefix_tokens)

    def _input_dtype(self) -> torch.dtype:
        """The data type of the module that reads pixels. Others may differ: FSDP2 converts a layer when it runs."""
        first: Any = next((m for m in self.wrapped.modules() if isinstance(m, Conv2d)), None)
        return next((first or self.wrapped).parameters()).dtype


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

"""What follows a text backbone: pooling and dense layers.

Shapes: T texts, L tokens, M size of a token state, D embedding size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final, get_args

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList
from typing_extensions import override

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.model import HeadConfig, Pooling, SingleSimilarity

_ACTIVATIONS: Final = {"identity": "linear", "tanh": "tanh", "relu": "relu", "gelu": "gelu", "sigmoid": "sigmoid"}


def validate_head(head: HeadConfig, input_dim: int, *, multi_vector: bool = False) -> list[str]:
    """Return what is wrong with ``head`` on top of token states of ``input_dim``, one sentence each.

    :param multi_vector: whether the model can return a vector for each token, with a mask.
    """
    errors = []
    if head.pooling not in get_args(Pooling):
        errors.append(f"`head.pooling` must be one of {', '.join(get_args(Pooling))}, but is '{head.pooling}' instead.")
    if head.pooling == "none" and not multi_vector:
        errors.append("`head.pooling` must not be 'none': the model returns one vector per text.")
    if head.similarity not in get_args(SingleSimilarity):
        errors.append(f"`head.similarity` must be 'cosine' or 'dot', but is '{head.similarity}' instead.")
    for idx, dense in enumerate(head.dense):
        where = f"head.dense[{idx}]"
        if dense.input_dim != input_dim:
            errors.append(f"`{where}.input_dim` must be {input_dim}, but is {dense.input_dim} instead.")
        if dense.output_dim < 1:
            errors.append(f"`{where}.output_dim` must be positive, but is {dense.output_dim} instead.")
        if dense.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            errors.append(f"`{where}.activation` must be one of {known}, but is '{dense.activation}' instead.")
        input_dim = dense.output_dim
    return errors


def head_output_dim(head: HeadConfig, input_dim: int) -> int:
    """Return the embedding size of ``head`` on top of token states of ``input_dim``."""
    return head.dense[-1].output_dim if head.dense else input_dim


@final
class TextHead(Module):
    """Pools token states and applies dense layers; does not normalise."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.dense = ModuleList(Linear(d.input_dim, d.output_dim, bias=d.bias) for d in config.dense)
        self.activations = ModuleList(create_activation(_ACTIVATIONS[d.activation]) for d in config.dense)

    @override
    def forward(self, seqs: Tensor, mask: Tensor | None, *, pooled: Tensor | None = None) -> Tensor:
        """
        :param seqs: token states. *Shape:* ``[T, L, M]``.
        :param mask: True for the tokens to pool; ``None`` means all. *Shape:* ``[T, L]``.
        :param pooled: what the backbone's own pooler gives, for the pooling "pooler". *Shape:* ``[T, M]``.
        :returns: embeddings. *Shape:* ``[T, D]``; ``[T, L, D]`` for the pooling "none".
        """
        if self.pooling == "pooler":
            assert pooled is not None
            embeds = pooled
        elif self.pooling == "none":
            # Never the last layer's own output. FSDP2 gathers weights in the order of its hooks on outputs, and would
            # gather in another order on a rank that packs its texts.
            embeds = seqs.view_as(seqs)
        else:
            embeds = pool(seqs, mask, self.pooling)
        for dense, activation in zip(self.dense, self.activations):
            embeds = activation(dense(embeds))
        return embeds

    if TYPE_CHECKING:
        __call__ = forward


def pool(seqs: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Make one state of many.

    The definitions are sentence-transformers': ``cls`` is the first token that
    counts, ``last`` the last one. The mean is taken in float32.

    :param seqs: token states. *Shape:* ``[T, L, M]``.
    :param mask: True for the tokens that count; ``None`` means all. *Shape:* ``[T, L]``.
    :returns: *Shape:* ``[T, M]``, of the data type of ``seqs``.
    """
    match pooling:
        case "cls":
            return seqs[:, 0] if mask is None else _take(seqs, mask.int().argmax(1))
        case "last":
            if mask is None:
                return seqs[:, -1]
            positions = torch.arange(seqs.size(1), device=seqs.device)
            return _take(seqs, (positions * mask).argmax(1))
        case "mean":
            if mask is None:
                return seqs.float().mean(1).to(seqs.dtype)
            weight = mask.unsqueeze(2).float()
            total = (seqs.float() * weight).sum(1)
            return (total / weight.sum(1).clamp(min=1e-9)).to(seqs.dtype)
        case "max":
            return seqs.amax(1) if mask is None else seqs.masked_fill(~mask.bool().unsqueeze(2), -torch.inf).amax(1)
        case _:
            raise ValueError(f"`pooling` must not be '{pooling}'.")


def _take(seqs: Tensor, index: Tensor) -> Tensor:
    """The state at ``index`` of each text. *Shape:* ``[T, M]``."""
    return seqs[torch.arange(seqs.size(0), device=seqs.device), index]

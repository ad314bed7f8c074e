"""What follows an image backbone: pooling, normalisation.

Shapes: P images, S prefix tokens (class, registers) and patches, K chosen
patches, M model size, D embedding size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, final, get_args

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cosine_similarity
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError

ImagePooling: TypeAlias = Literal["cls", "mean", "cls_mean", "gem", "topk", "pooler", "none"]


@dataclass(kw_only=True)
class ImageHeadConfig:
    """What follows an image backbone: pooling, normalisation."""

    pooling: ImagePooling = "cls"
    """
    How the final states become an embedding: the class token's (``cls``), the
    mean of the patches' (``mean``), both, one after the other (``cls_mean``),
    the generalised mean of the patches' (``gem``), the mean of the ``top_k``
    patches most similar to the class token (``topk``), or what the backbone's
    own pooler makes (``pooler``). With ``none``, each patch becomes a vector of
    its own, or only the ``top_k`` most similar to the class token.
    """

    top_k: int | None = None
    """The number of patches of ``topk``; of ``none``, all if ``None``. An image of fewer patches has all of them."""

    gem_p: float = 3.0
    """The exponent of ``gem``: 1 is the mean, and a large one the maximum."""

    normalize: bool = True
    """If ``True``, the model's own embeddings are of unit length (applied by ``Embedder``, not by the model)."""


def image_head_of(config: object) -> ImageHeadConfig | None:
    """Return the image head of a model configuration, if it has one."""
    name = _image_head_field(config)
    head: ImageHeadConfig | None = None if name is None else getattr(config, name)
    return head


def set_image_head(config: object, head: ImageHeadConfig) -> None:
    """Replace the image head of a model configuration.

    :raises ModelLoadError: it has none.
    """
    name = _image_head_field(config)
    if name is None:
        raise ModelLoadError("The folder names an image pooling, but its model has no options for that.")
    setattr(config, name, head)


def _image_head_field(config: object) -> str | None:
    names = ("image_head", "head")
    return next((n for n in names if isinstance(getattr(config, n, None), ImageHeadConfig)), None)


def validate_image_head(
    head: ImageHeadConfig, *, has_class_token: bool = True, has_pooler: bool = False, name: str = "head"
) -> list[str]:
    """Return what is wrong with ``head``, one sentence each.

    :param has_class_token: whether the backbone has a class token.
    :param has_pooler: whether it has a pooler.
    :param name: the field that holds ``head``.
    """
    errors = []
    if head.pooling not in get_args(ImagePooling):
        known = ", ".join(get_args(ImagePooling))
        errors.append(f"`{name}.pooling` must be one of {known}, but is '{head.pooling}' instead.")
    needs_class_token = head.pooling in ("cls", "cls_mean", "topk") or head.top_k is not None
    if needs_class_token and not has_class_token:
        errors.append(f"`{name}` looks at the class token, but the model has none.")
    if head.pooling == "pooler" and not has_pooler:
        errors.append(f"`{name}.pooling` is 'pooler', but the model has none.")
    if head.pooling == "topk" and head.top_k is None:
        errors.append(f"`{name}.top_k` must be set for the pooling 'topk'.")
    if head.top_k is not None and head.pooling not in ("topk", "none"):
        errors.append(f"`{name}.top_k` is set, but the pooling '{head.pooling}' does not use it.")
    if head.top_k is not None and head.top_k < 1:
        errors.append(f"`{name}.top_k` must be at least 1, but is {head.top_k} instead.")
    if head.gem_p <= 0.0:
        errors.append(f"`{name}.gem_p` must be positive, but is {head.gem_p} instead.")
    return errors


def image_head_output_dim(head: ImageHeadConfig, model_dim: int, pooler_dim: int | None = None) -> int:
    """Return the embedding size of ``head`` on top of states of ``model_dim``.

    :param pooler_dim: the size of what the backbone's own pooler makes, if that differs.
    """
    if head.pooling == "pooler" and pooler_dim is not None:
        return pooler_dim
    return 2 * model_dim if head.pooling == "cls_mean" else model_dim


@final
class ImageHead(Module):
    """Pools the final states of images; does not normalise."""

    def __init__(self, config: ImageHeadConfig, num_prefix_tokens: int = 1) -> None:
        """
        :param num_prefix_tokens: how many states come before those of the patches; the first is the class token's.
        """
        super().__init__()
        self.pooling = config.pooling
        self.top_k = config.top_k
        self.gem_p = config.gem_p
        self.num_prefix_tokens = num_prefix_tokens

    @override
    def forward(self, seqs_PSM: Tensor, *, pooled: Tensor | None = None) -> Tensor:
        """
        :param pooled: what the backbone's own pooler gives, for the pooling "pooler". *Shape:* ``[P, D]``.
        :returns: embeddings. *Shape:* ``[P, D]``; ``[P, K, D]`` for the pooling "none".
        """
        patches_PSM = seqs_PSM[:, self.num_prefix_tokens :]
        match self.pooling:
            case "cls":
                return seqs_PSM[:, 0]
            case "mean":
                return _mean(patches_PSM)
            case "cls_mean":
                return torch.cat([seqs_PSM[:, 0], _mean(patches_PSM)], dim=1)
            case "gem":
                return _generalised_mean(patches_PSM, self.gem_p)
            case "topk":
                return _mean(self._choose(seqs_PSM[:, 0], patches_PSM))
            case "none":
                return self._choose(seqs_PSM[:, 0], patches_PSM)
            case "pooler":
                assert pooled is not None
                return pooled

    def _choose(self, class_PM: Tensor, patches_PSM: Tensor) -> Tensor:
        """The patches most similar to the class token (by cosine), in their order in the image. ``[P, K, M]``."""
        if self.top_k is None or self.top_k >= patches_PSM.size(1):
            return patches_PSM
        with torch.no_grad():
            score_PS = cosine_similarity(patches_PSM.float(), class_PM.float().unsqueeze(1), dim=2)
            index_PK = score_PS.topk(self.top_k, dim=1).indices.sort(dim=1).values
        return patches_PSM.gather(1, index_PK.unsqueeze(2).expand(-1, -1, patches_PSM.size(2)))

    if TYPE_CHECKING:
        __call__ = forward

    @override
    def extra_repr(self) -> str:
        return f"pooling={self.pooling}, top_k={self.top_k}, gem_p={self.gem_p:G}"


def _mean(seqs_PSM: Tensor) -> Tensor:
    return seqs_PSM.float().mean(1).to(seqs_PSM.dtype)


def _generalised_mean(seqs_PSM: Tensor, p: float) -> Tensor:
    """The p-th root of the mean of p-th powers, of what is positive.

    Radenović et al., 2018, https://arxiv.org/abs/1711.02512.
    """
    # Not 0, whose root has no gradient.
    powers_PSM = seqs_PSM.float().clamp(min=1e-6).pow(p)
    return powers_PSM.mean(1).pow(1.0 / p).to(seqs_PSM.dtype)

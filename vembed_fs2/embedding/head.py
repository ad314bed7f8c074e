"""The head after a backbone of texts, of images or of both: pooling, dense layers, and what embeddings are.

Shapes: N texts or images, L states (of tokens; of class token, registers and patches), K chosen states,
M size of a state, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleList
from torch.nn.functional import cosine_similarity
from typing_extensions import override

from vembed_fs2.embedding.activations import create_activation

SingleSimilarity: TypeAlias = Literal["cosine", "dot"]
"""How two vectors are compared."""

Similarity: TypeAlias = Literal["cosine", "dot", "maxsim"]
"""How two rows are compared, of one vector or of several."""

MAXSIM: Final = "maxsim"
"""The similarity of rows of several vectors: late interaction."""


def is_late_interaction(similarity: object) -> bool:
    """Whether a similarity compares rows of several vectors."""
    return similarity == MAXSIM


Pooling: TypeAlias = str
"""The name of a pooling: one of :class:`HeadConfig`'s, or one that a package has registered."""

PoolFunction: TypeAlias = Callable[[Tensor, "Tensor | None"], Tensor]
"""
Makes one state of many: takes states ``[N, L, M]`` and a mask ``[N, L]``, True for
the states that count (``None`` means all), and returns ``[N, M]``.
"""

_BUILT_IN: Final = (
    "cls", "mean", "pooler", "last", "max", "none", "weightedmean", "mean_sqrt_len", "cls_mean", "gem", "topk",
)  # fmt: skip

_REGISTERED: Final[dict[str, PoolFunction]] = {}


def register_pooling(name: str, function: PoolFunction) -> None:
    """Register a pooling, which ``head.pooling`` can then name for models of any family.

    For an image, the function gets the states of the patches. To register the
    same function again changes nothing: a package's setup runs once per container.

    :raises ValueError: another pooling has this name.
    """
    known = _REGISTERED.get(name, function)
    is_same = (known.__module__, known.__qualname__) == (function.__module__, function.__qualname__)
    if name in _BUILT_IN or not is_same:
        raise ValueError(f"There is a pooling '{name}' already.")

    _REGISTERED[name] = function


_ACTIVATIONS: Final = {"identity": "linear", "tanh": "tanh", "relu": "relu", "gelu": "gelu", "sigmoid": "sigmoid"}


@dataclass(kw_only=True)
class DenseConfig:
    """A dense layer after the pooling (sentence-transformers' ``Dense`` module)."""

    input_dim: int
    """The size of its inputs."""

    output_dim: int
    """The size of its outputs."""

    bias: bool = True
    """If ``True``, adds a bias."""

    activation: Literal["identity", "tanh", "relu", "gelu", "sigmoid"] = "identity"
    """The activation function that follows."""


@dataclass(kw_only=True)
class HeadConfig:
    """The head after a backbone: pooling, dense layers, normalisation."""

    pooling: Pooling | Sequence[Pooling] = "mean"
    """
    How the states of tokens or patches become one embedding: the state of the
    first token or the class token (``cls``); the ``mean``, or a mean with the
    positions 1, 2, 3, ... for weights (``weightedmean``); the sum over the
    square root of the length (``mean_sqrt_len``); the maximum (``max``); the
    state of the ``last`` token; the generalised mean (``gem``); the mean of the
    ``top_k`` states most similar to the class token (``topk``); or what the
    backbone's own pooler makes (``pooler``). Several are put one after the
    other; ``cls_mean`` stands for ``cls`` and ``mean``. With ``none``, each
    state becomes a vector of its own, or only the ``top_k`` most similar to the
    class token.
    """

    top_k: int | None = None
    """The number of states of ``topk``; of ``none``, all if ``None``. An input of fewer has all of them."""

    gem_p: float = 3.0
    """The exponent of ``gem``: 1 is the mean, and a large one the maximum."""

    include_prompt: bool = True
    """If ``False``, the tokens of a prompt take no part in mean pooling, and have no vectors of their own."""

    dense: Sequence[DenseConfig] = field(default_factory=list)
    """Dense layers after the pooling."""

    normalize: bool | None = None
    """
    Whether the model ends with a normalisation (applied by ``Embedder``, not by
    the model): if ``True``, all its embeddings are of unit length; if ``False``,
    none is scaled. If ``None``, nobody has said it: embeddings are scaled unless
    the caller of ``encode`` objects.
    """

    similarity: SingleSimilarity = "cosine"
    """How two embeddings are compared. Several vectors per row are always compared by MaxSim."""

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """The poolings whose results are put one after the other."""
        names = (self.pooling,) if isinstance(self.pooling, str) else tuple(self.pooling)
        return tuple(part for name in names for part in (("cls", "mean") if name == "cls_mean" else (name,)))

    @property
    def is_multi_vector(self) -> bool:
        """Whether a row has several vectors."""
        return "none" in self.poolings

    @property
    def is_unit(self) -> bool:
        """Whether embeddings are meant to be of unit length."""
        return self.normalize is not False

    @property
    def is_pooler_alone(self) -> bool:
        """Whether nothing follows the backbone's own pooler, but perhaps a normalisation."""
        return self.poolings == ("pooler",) and not self.dense

    @property
    def reads_pooler(self) -> bool:
        """Whether an embedding depends on what the backbone's own pooler makes."""
        return "pooler" in self.poolings

    @property
    def reads_states(self) -> bool:
        """Whether an embedding depends on the states of tokens or patches themselves."""
        return any(name != "pooler" for name in self.poolings)


@dataclass(kw_only=True)
class ImageHeadConfig(HeadConfig):
    """The head after an image backbone: as any head, with the class token's state for a default."""

    pooling: Pooling | Sequence[Pooling] = "cls"


class States(NamedTuple):
    """What a backbone makes of texts or images. A head needs only some of it, see :class:`HeadConfig`."""

    tokens: Tensor | None = None
    """The final state of each token, or of class token, registers and patches. *Shape:* ``[N, L, M]``."""

    mask: Tensor | None = None
    """True for the states that count; ``None`` means all. *Shape:* ``[N, L]``."""

    pooled: Tensor | None = None
    """What the backbone's own pooler makes. *Shape:* ``[N, P]``."""

    num_prefix_tokens: int = 0
    """The number of states before the patches' states of an image; the first is the class token's."""


def validate_head(
    head: HeadConfig,
    input_dim: int,
    *,
    multi_vector: bool = False,
    has_class_token: bool = True,
    has_pooler: bool = True,
    pooler_dim: int | None = None,
    name: str = "head",
) -> list[str]:
    """Return what is wrong with ``head`` on top of states of ``input_dim``, one sentence each.

    :param multi_vector: whether the model can return several vectors per row: it has ``encode_text_states`` or
        ``encode_image_states``, or gives a mask itself.
    :param has_class_token: whether the backbone has a class token, or texts, whose first token stands for it.
    :param has_pooler: whether it has a pooler.
    :param pooler_dim: the size of what the pooler makes, if that differs from ``input_dim``.
    :param name: the field that holds ``head``.
    """
    known, poolings = (*_BUILT_IN, *_REGISTERED), head.poolings
    if not poolings or any(pooling not in known for pooling in poolings):
        return [f"`{name}.pooling` must be one of {', '.join(known)}, but is '{head.pooling}' instead."]

    errors = []
    if head.is_multi_vector and len(poolings) > 1:
        errors.append(f"`{name}.pooling` must not have 'none' beside others.")
    if head.is_multi_vector and not multi_vector:
        errors.append(f"`{name}.pooling` must not be 'none': the model returns one vector per row.")
    if head.reads_pooler and not has_pooler:
        errors.append(f"`{name}.pooling` is 'pooler', but the model has none.")
    if ("cls" in poolings or "topk" in poolings or head.top_k is not None) and not has_class_token:
        errors.append(f"`{name}` looks at the class token, but the model has none.")
    if "topk" in poolings and head.top_k is None:
        errors.append(f"`{name}.top_k` must be set for the pooling 'topk'.")
    if head.top_k is not None and not {"topk", "none"} & set(poolings):
        errors.append(f"`{name}.top_k` is set, but the pooling '{head.pooling}' does not use it.")
    if head.top_k is not None and head.top_k < 1:
        errors.append(f"`{name}.top_k` must be greater than or equal to 1, but is {head.top_k} instead.")
    if head.gem_p <= 0.0:
        errors.append(f"`{name}.gem_p` must be positive, but is {head.gem_p} instead.")
    if head.similarity not in get_args(SingleSimilarity):
        errors.append(f"`{name}.similarity` must be 'cosine' or 'dot', but is '{head.similarity}' instead.")

    return errors + _dense_errors(head, _pooled_dim(head, input_dim, pooler_dim), name)


def _dense_errors(head: HeadConfig, input_dim: int, name: str) -> list[str]:
    errors = []
    for idx, dense in enumerate(head.dense):
        where = f"{name}.dense[{idx}]"
        if dense.input_dim != input_dim:
            errors.append(f"`{where}.input_dim` must be {input_dim}, but is {dense.input_dim} instead.")
        if dense.output_dim < 1:
            errors.append(f"`{where}.output_dim` must be positive, but is {dense.output_dim} instead.")

        if dense.activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            errors.append(f"`{where}.activation` must be one of {known}, but is '{dense.activation}' instead.")

        input_dim = dense.output_dim

    return errors


def head_output_dim(head: HeadConfig, input_dim: int, pooler_dim: int | None = None) -> int:
    """Return the embedding size of ``head`` on top of states of ``input_dim``.

    :param pooler_dim: the size of what the backbone's own pooler makes, if that differs.
    """
    return head.dense[-1].output_dim if head.dense else _pooled_dim(head, input_dim, pooler_dim)


def _pooled_dim(head: HeadConfig, input_dim: int, pooler_dim: int | None) -> int:
    return sum((pooler_dim or input_dim) if name == "pooler" else input_dim for name in head.poolings)


class Head(Module):
    """Makes embeddings of states, of one vector or of several; does not normalise.

    What the embeddings of a model are is said here alone: :attr:`output_dim` is
    their size, :attr:`normalize` whether they are meant to be of unit length,
    :attr:`has_normalization` whether the model ends with that, and
    :attr:`similarity` how they are compared.
    """

    def __init__(self, config: HeadConfig, input_dim: int, *, pooler_dim: int | None = None) -> None:
        """
        :param config: valid on top of such states (see :func:`validate_head`).
        :param input_dim: the size of a state.
        :param pooler_dim: the size of what the backbone's own pooler makes, if that differs.
        """
        super().__init__()
        self.config = config
        self.output_dim = head_output_dim(config, input_dim, pooler_dim)
        self.normalize = config.is_unit
        self.has_normalization = config.normalize is True
        self.similarity: Similarity = MAXSIM if config.is_multi_vector else config.similarity
        self.dense = ModuleList(Linear(d.input_dim, d.output_dim, bias=d.bias) for d in config.dense)
        self.activations = ModuleList(create_activation(_ACTIVATIONS[d.activation]) for d in config.dense)

    @override
    def forward(self, states: States) -> tuple[Tensor, Tensor | None]:
        """Return embeddings ``[N, D]`` and ``None``; of several vectors, ``[N, K, D]`` and a mask ``[N, K]``."""
        mask: Tensor | None = None
        if self.config.is_multi_vector:
            embeds, mask = self._separate(states)
        else:
            parts = [self._pool(states, pooling) for pooling in self.config.poolings]
            embeds = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

        for dense, activation in zip(self.dense, self.activations):
            embeds = activation(dense(embeds))

        return embeds, mask

    def _separate(self, states: States) -> tuple[Tensor, Tensor]:
        """Give each state, or each that is chosen, a vector. *Returns:* ``[N, K, M]``, and which count, ``[N, K]``."""
        vectors, mask = _choose(states, self.config.top_k)

        # Never the last layer's own output. FSDP2 gathers weights in the order of its hooks on outputs, and would
        # gather in another order on a rank that packs its texts.
        vectors = vectors.view_as(vectors)
        return vectors, vectors.new_ones(vectors.shape[:2], dtype=torch.bool) if mask is None else mask.bool()

    def _pool(self, states: States, pooling: Pooling) -> Tensor:
        """Make one vector of each input. *Returns:* ``[N, M]``."""
        if pooling == "pooler":
            assert states.pooled is not None
            return states.pooled

        if pooling == "cls":
            assert states.tokens is not None
            return pool(states.tokens, states.mask, "cls")

        if pooling == "topk":
            return pool(*_choose(states, self.config.top_k), "mean")

        return pool(*_choose(states, None), pooling, gem_p=self.config.gem_p)

    if TYPE_CHECKING:
        __call__ = forward

    @override
    def extra_repr(self) -> str:
        config = self.config
        return f"pooling={config.pooling}, top_k={config.top_k}, gem_p={config.gem_p:G}, similarity={self.similarity}"


def _choose(states: States, top_k: int | None) -> tuple[Tensor, Tensor | None]:
    """Leave out what comes before patches, and all but the ``top_k`` states most similar to the class token.

    They keep their order. *Returns:* ``[N, K, M]`` and a mask ``[N, K]``, if states have one.
    """
    tokens, mask, _, num_prefix = states
    assert tokens is not None

    chosen, chosen_mask = tokens[:, num_prefix:], None if mask is None else mask[:, num_prefix:].bool()
    if top_k is None or top_k >= chosen.size(1):
        return chosen, chosen_mask

    with torch.no_grad():
        first = pool(tokens, mask, "cls").float().unsqueeze(1)

        score = cosine_similarity(chosen.float(), first, dim=2)
        if chosen_mask is not None:
            score = score.masked_fill(~chosen_mask, -torch.inf)
        index = score.topk(top_k, dim=1).indices.sort(dim=1).values

    chosen = chosen.gather(1, index.unsqueeze(2).expand(-1, -1, chosen.size(2)))
    return chosen, None if chosen_mask is None else chosen_mask.gather(1, index)


def pool(seqs: Tensor, mask: Tensor | None, pooling: Pooling, *, gem_p: float = 3.0) -> Tensor:
    """Make one state of many.

    The definitions are sentence-transformers': ``cls`` is the first token that
    counts, ``last`` the last one, and the weights of ``weightedmean`` are the
    positions, of padding on the left as well. Means are taken in float32.
    ``gem`` is the p-th root of the mean of p-th powers, of what is positive
    (Radenović et al., 2018, https://arxiv.org/abs/1711.02512). If no token of a
    text counts, its state is zero.

    :param seqs: token states. *Shape:* ``[N, L, M]``.
    :param mask: True for the tokens that count; ``None`` means all. *Shape:* ``[N, L]``.
    :param gem_p: the exponent of ``gem``.
    :returns: *Shape:* ``[N, M]``, of the data type of ``seqs``.
    """
    if mask is None:
        return _pool(seqs, None, pooling, gem_p)

    # Poolings see at least one token, so that none divides by zero, in the backward pass either.
    mask = mask.bool()
    is_empty = ~mask.any(1, keepdim=True)
    return _pool(seqs, mask | is_empty, pooling, gem_p).masked_fill(is_empty, 0.0)


def _pool(seqs: Tensor, mask: Tensor | None, pooling: Pooling, gem_p: float) -> Tensor:
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
            total, weight = _weighted_sum(seqs, mask)
            return (total / weight).to(seqs.dtype)
        case "mean_sqrt_len":
            total, weight = _weighted_sum(seqs, seqs.new_ones(seqs.shape[:2]) if mask is None else mask)
            return (total / weight.sqrt()).to(seqs.dtype)
        case "weightedmean":
            positions = torch.arange(1, seqs.size(1) + 1, device=seqs.device).expand(seqs.shape[:2])
            total, weight = _weighted_sum(seqs, positions if mask is None else positions * mask)
            return (total / weight).to(seqs.dtype)
        case "gem":
            # Not 0, whose root has no gradient.
            powers = seqs.float().clamp(min=1e-6).pow(gem_p)
            return _pool(powers, mask, "mean", gem_p).pow(1.0 / gem_p).to(seqs.dtype)
        case "max":
            return seqs.amax(1) if mask is None else seqs.masked_fill(~mask.unsqueeze(2), -torch.inf).amax(1)
        case _:
            if pooling not in _REGISTERED:
                raise ValueError(f"`pooling` must not be '{pooling}'.")
            return _REGISTERED[pooling](seqs, mask)


def _weighted_sum(seqs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """*Returns:* the sum of states times their weights ``[N, M]``, and of the weights ``[N, 1]``, never 0."""
    weight = weight.unsqueeze(2).float()
    return (seqs.float() * weight).sum(1), weight.sum(1).clamp(min=1e-9)


def _take(seqs: Tensor, index: Tensor) -> Tensor:
    """The state at ``index`` of each text. *Shape:* ``[N, M]``."""
    return seqs[torch.arange(seqs.size(0), device=seqs.device), index]


class TextHead(Head):
    """A head of texts as plugins have called it; :class:`Head` knows the size of embeddings and takes states."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config, config.dense[0].input_dim if config.dense else 0)

    @override
    def forward(  # type: ignore[override]
        self, seqs: Tensor, mask: Tensor | None = None, *, pooled: Tensor | None = None
    ) -> Tensor:
        return super().forward(States(seqs, mask, pooled))[0]

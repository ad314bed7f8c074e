from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.nn import Module

from vembed_fs2.embedding.head import TextHead, head_output_dim, validate_head
from vembed_fs2.embedding.image_head import ImageHead, ImageHeadConfig, image_head_output_dim, validate_image_head
from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.models.auto.backbone import Backbone, unfit
from vembed_fs2.models.auto.config import AUTO_FAMILY, AutoModelConfig
from vembed_fs2.models.auto.layers import find_layer_stacks
from vembed_fs2.models.auto.model import AutoEmbeddingModel
from vembed_fs2.models.auto.trace import Trace, trace_image, trace_text

log = logging.getLogger("vembed_fs2")


def create_auto_model(config: AutoModelConfig) -> AutoEmbeddingModel:
    """Create a model of transformers with random weights, wrapped as an embedding model.

    On the meta device, it has no weights.

    :raises ConfigError: ``config`` is not valid.
    :raises ModelLoadError: no embeddings can be made with the model.
    """
    # Where and in which type fairseq2 wants tensors.
    like = torch.empty(0)

    def create() -> AutoEmbeddingModel:
        if like.is_meta:
            return _create_empty(config, config.backbone())
        return wrap_model(config, config.backbone(), config.backbone().create())

    # A thread of its own has no function modes. fairseq2's would give integer buffers that type as well, and with
    # all of them disabled transformers could not make its masks.
    with ThreadPoolExecutor(1, "vembed-create") as pool:
        model = pool.submit(create).result()
    _convert(model, like.dtype)
    model.to(like.device)
    _log_once(describe(model))
    return model.train()


def _create_empty(config: AutoModelConfig, backbone: Backbone) -> AutoEmbeddingModel:
    """Wrap a model without memory for its weights."""

    def wrap(probe: Module) -> AutoEmbeddingModel:
        empty, constants = backbone.create_without_weights()
        model = wrap_model(config, backbone, empty, probe=probe)
        model.constants = constants
        return model

    try:
        return wrap(backbone.create_probe())
    except ModelLoadError:
        # Perhaps because its own initial weights are what the model needs.
        return wrap(backbone.create())


def _convert(model: Module, dtype: torch.dtype) -> None:
    """Convert what a checkpoint holds; other buffers (frequencies of positions) keep their precision."""
    kept = model.state_dict(keep_vars=True)
    for tensor in kept.values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def wrap_model(
    config: AutoModelConfig, backbone: Backbone, wrapped: Module, *, probe: Module | None = None
) -> AutoEmbeddingModel:
    """Wrap a model of transformers; freeze what its embeddings do not depend on.

    :param wrapped: the model.
    :param probe: one of the same configuration on the CPU, in float32, that shows what it does; ``None`` if
        ``wrapped`` itself is such a model.
    :raises ConfigError: a head does not fit.
    :raises ModelLoadError: no embeddings can be made with the model.
    """
    model = AutoEmbeddingModel(wrapped.eval(), backbone)
    probe = wrapped if probe is None else probe.eval()
    used: set[str] = set()
    calls: Counter[str] = Counter()
    if "text" in backbone.modalities:
        trace = trace_text(backbone, probe)
        _add_text_head(model, config, backbone, trace)
        used |= trace.used_parameters(pooled=model.head is None or model.head.pooling == "pooler")
        calls += trace.calls
    if "image" in backbone.modalities:
        trace = trace_image(backbone, probe)
        _add_image_head(model, config, backbone, trace)
        used |= trace.used_parameters(pooled=model.image_head is None or model.image_head.pooling == "pooler")
        calls += trace.calls
    for name, parameter in wrapped.named_parameters():
        if name not in used:
            parameter.requires_grad_(False)
    model.set_layer_stacks(list(find_layer_stacks(wrapped, calls)))
    return model


def _add_text_head(model: AutoEmbeddingModel, config: AutoModelConfig, backbone: Backbone, trace: Trace) -> None:
    states, pooled, _ = trace.outputs
    if backbone.is_dual:
        assert pooled is not None
        model.embedding_dim = pooled.size(1)
        return
    head = config.head or default_head(backbone)
    pools = head.pooling == "pooler"
    found = pooled if pools else states
    if found is None:
        raise _no_output(backbone, "head", "pooler output" if pools else "states of tokens (`last_hidden_state`)")
    if errors := validate_head(head, found.size(-1), multi_vector=True):
        raise ConfigError(errors, where=f"The {AUTO_FAMILY} configuration")
    model.head = TextHead(head)
    model.embedding_dim = head_output_dim(head, found.size(-1))
    model.normalize = head.normalize
    model.similarity = "maxsim" if head.pooling == "none" else head.similarity


def _add_image_head(model: AutoEmbeddingModel, config: AutoModelConfig, backbone: Backbone, trace: Trace) -> None:
    states, pooled, _ = trace.outputs
    if backbone.is_dual:
        assert pooled is not None
        if pooled.size(1) != model.embedding_dim:
            sizes = f"{model.embedding_dim} values per text and {pooled.size(1)} per image"
            raise unfit(backbone.kls, f"its embeddings have {sizes}")
        patch = getattr(backbone.vision_config, "patch_size", None)
        height, width = backbone.image_size
        model.image_shape = (backbone.num_channels, height, width)
        model.tokens_per_image = (height // patch) * (width // patch) + 1 if isinstance(patch, int) else 1
        return
    head = config.image_head or default_image_head(trace)
    errors = validate_image_head(
        head, has_class_token=trace.has_class_token, has_pooler=pooled is not None, name="image_head"
    )
    if errors:
        raise ConfigError(errors, where=f"The {AUTO_FAMILY} configuration")
    if states is None and head.pooling != "pooler":
        raise _no_output(backbone, "image_head", "states of patches (`last_hidden_state`)")
    found = pooled if states is None else states
    assert found is not None
    model.image_head = ImageHead(head, trace.num_prefix_tokens)
    pooler_dim = None if pooled is None else pooled.size(1)
    model.embedding_dim = image_head_output_dim(head, found.size(-1), pooler_dim)
    model.normalize = head.normalize
    model.similarity = "maxsim" if head.pooling == "none" else "cosine"
    model.tokens_per_image = 1 if states is None else states.size(1)
    model.image_shape = (backbone.num_channels, *backbone.image_size)


def default_head(backbone: Backbone) -> HeadConfig:
    """What follows the states of texts where nothing says it."""
    return HeadConfig(pooling="last" if backbone.is_causal else "mean")


def default_image_head(trace: Trace) -> ImageHeadConfig:
    """What follows the states of images where nothing says it."""
    if trace.outputs.pooled is not None:
        return ImageHeadConfig(pooling="pooler")
    return ImageHeadConfig(pooling="cls" if trace.has_class_token else "mean")


def _no_output(backbone: Backbone, field: str, what: str) -> ModelLoadError:
    kls = backbone.kls.__name__
    return ModelLoadError(f"transformers' {kls} gives no {what}: set another `{field}.pooling`.")


def describe(model: AutoEmbeddingModel) -> str:
    """Say how a model is wrapped, and what it therefore cannot do."""
    poolings = [
        f"`{field}.pooling` {head.pooling}"
        for field, head in (("head", model.head), ("image_head", model.image_head))
        if head is not None
    ]
    names = {id(module): name for name, module in model.wrapped.named_modules()}
    stacks = [f"{names[id(stack)]} ({len(stack)})" for stack in model.layer_stacks()]
    layers = f"Its layers are {', '.join(stacks)}." if stacks else "It has no layers that FSDP2 could shard one by one."
    frozen = [name for name, p in model.wrapped.named_parameters() if not p.requires_grad]
    unused = f" Frozen, as no embedding depends on them: {', '.join(frozen)}." if frozen else ""
    return (
        f"{type(model.wrapped).__name__} is wrapped as transformers has it, with "
        f"{' and '.join(poolings) or 'its own projections'}. "
        f"{layers}{unused} A wrapped model has no tensor parallelism and no packed texts."
    )


@cache
def _log_once(message: str) -> None:
    """Log a message, unless it was logged before."""
    log.info(message)

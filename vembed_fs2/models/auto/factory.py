"""How a model of transformers is wrapped: heads, and what its embeddings depend on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.nn import Module

from vembed_fs2.embedding.head import Head, HeadConfig, ImageHeadConfig, validate_head
from vembed_fs2.embedding.model import Modality
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
    # Has the device and the data type that fairseq2 wants.
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
    used: dict[Modality, frozenset[str]] = {}
    calls: Counter[str] = Counter()

    if "text" in backbone.modalities:
        trace = trace_text(backbone, probe)
        _add_head(model, config.head or config.image_head or default_head(backbone), "head", trace)
        used["text"] = trace.used_parameters(model.head.config)
        calls += trace.calls

    if "image" in backbone.modalities:
        trace = trace_image(backbone, probe)
        _add_head(model, config.image_head or default_image_head(trace), "image_head", trace)
        model.num_prefix_tokens = trace.num_prefix_tokens
        model.tokens_per_image = _count_tokens(backbone, trace)
        model.image_shape = (backbone.num_channels, *backbone.image_size)
        used["image"] = trace.used_parameters(model.head.config)
        calls += trace.calls

    if backbone.is_dual:
        model.towers = find_towers(model, {k: {f"wrapped.{name}" for name in names} for k, names in used.items()})

    all_used = frozenset[str]().union(*used.values())
    for name, parameter in wrapped.named_parameters():
        if name not in all_used:
            parameter.requires_grad_(False)

    model.set_layer_stacks(list(find_layer_stacks(wrapped, calls)))
    return model


def find_towers(model: Module, used: Mapping[Modality, Collection[str]]) -> dict[Modality, list[str]]:
    """Find the modules that encode a modality alone, by the parameters that its embeddings depend on.

    :param used: the names of these parameters.
    :returns: the names of the outermost such modules.
    """
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    towers: dict[Modality, list[str]] = {}
    for modality in used:
        others = {name for other, names in used.items() if other != modality for name in names}
        tower = towers[modality] = []
        for name, module in model.named_modules():
            held = {first_names[id(parameter)] for parameter in module.parameters()}
            is_inside = name.startswith(tuple(f"{outer}." for outer in tower))
            if not is_inside and held.intersection(used[modality]) and held.isdisjoint(others):
                tower.append(name)

    return towers


def _add_head(model: AutoEmbeddingModel, config: HeadConfig, field: str, trace: Trace) -> None:
    """Add the head after the wrapped model. A dual encoder's projections of texts and images share one head.

    :raises ConfigError: it does not fit.
    :raises ModelLoadError: the wrapped model does not give what it reads.
    """
    states, pooled, _ = trace.outputs
    backbone, kls = model.backbone, model.backbone.kls.__name__
    if backbone.is_dual:
        assert pooled is not None

        size = pooled.size(1)
        if hasattr(model, "head") and model.embedding_dim != size:
            raise unfit(backbone.kls, f"its embeddings have {model.embedding_dim} values per text and {size} per image")

        model.head = Head(HeadConfig(pooling="pooler", normalize=config.normalize), size)
        return

    if states is None and config.reads_states:
        what = f"states of {'tokens' if field == 'head' else 'patches'} (`last_hidden_state`)"
        raise ModelLoadError(f"transformers' {kls} gives no {what}: set another `{field}.pooling`.")

    state_dim = 0 if states is None else states.size(-1)
    pooler_dim = None if pooled is None else pooled.size(1)

    errors = validate_head(
        config,
        state_dim,
        multi_vector=True,
        has_class_token=field == "head" or trace.has_class_token,
        has_pooler=pooled is not None,
        pooler_dim=pooler_dim,
        name=field,
    )
    if errors:
        raise ConfigError(errors, where=f"The {AUTO_FAMILY} configuration")

    model.head = Head(config, state_dim, pooler_dim=pooler_dim)


def _count_tokens(backbone: Backbone, trace: Trace) -> int:
    """What an image costs to encode, in tokens; 1 if nothing tells."""
    if not backbone.is_dual:
        return 1 if trace.outputs.states is None else trace.outputs.states.size(1)

    patch = getattr(backbone.vision_config, "patch_size", None)
    height, width = backbone.image_size
    return (height // patch) * (width // patch) + 1 if isinstance(patch, int) else 1


def default_head(backbone: Backbone) -> HeadConfig:
    """Return the head after the states of texts, if nothing names one."""
    return HeadConfig(pooling="last" if backbone.is_causal else "mean")


def default_image_head(trace: Trace) -> ImageHeadConfig:
    """Return the head after the states of images, if nothing names one."""
    if trace.outputs.pooled is not None:
        return ImageHeadConfig(pooling="pooler")
    return ImageHeadConfig(pooling="cls" if trace.has_class_token else "mean")


def describe(model: AutoEmbeddingModel) -> str:
    """Say how a model is wrapped, and what it therefore cannot do."""
    pooling = "its own projections"
    if not model.backbone.is_dual:
        field = "head" if "text" in model.modalities else "image_head"
        pooling = f"`{field}.pooling` {model.head.config.pooling}"

    names = {id(module): name for name, module in model.wrapped.named_modules()}
    stacks = [f"{names[id(stack)]} ({len(stack)})" for stack in model.layer_stacks()]
    layers = f"Its layers are {', '.join(stacks)}." if stacks else "It has no layers that FSDP2 could shard one by one."
    frozen = [name for name, p in model.wrapped.named_parameters() if not p.requires_grad]
    unused = f" Frozen, as no embedding depends on them: {', '.join(frozen)}." if frozen else ""

    return (
        f"{type(model.wrapped).__name__} is wrapped as transformers has it, with "
        f"{pooling}. "
        f"{layers}{unused} A wrapped model has no tensor parallelism and no packed texts."
    )


@cache
def _log_once(message: str) -> None:
    """Log a message, unless it was logged before."""
    log.info(message)

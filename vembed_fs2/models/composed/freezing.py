"""Which parameters of an encoder keep their values in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch.nn import Module, ModuleList

from vembed_fs2.embedding.freezing import find_matches
from vembed_fs2.errors import ConfigError


def find_frozen(
    encoder: Module,
    stacks: Sequence[str],
    freeze: Literal["none", "all", "all_but_last"],
    trained_layers: int | None,
    patterns: Sequence[str],
) -> frozenset[str]:
    """Return the names of the parameters that are frozen, those that the encoder itself froze included.

    :param stacks: the names of the encoder's stacks of layers, first to last.
    :param trained_layers: how many of the last layers ``all_but_last`` trains.
    :param patterns: regular expressions that the beginnings of names match.
    :raises ConfigError: there are fewer layers, or a pattern matches nothing.
    """
    names = [name for name, _ in encoder.named_parameters()]
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    errors = []
    if freeze == "all":
        frozen.update(names)
    elif freeze == "all_but_last":
        assert trained_layers is not None

        layers = _layer_names(encoder, stacks)
        if trained_layers > len(layers):
            errors.append(f"`trained_layers` must be at most {len(layers)}, but is {trained_layers} instead.")
        else:
            frozen.update(_before(names, layers, trained_layers))

    try:
        frozen.update(find_matches(names, patterns))
    except ConfigError as ex:
        errors += [f"`frozen_params`: {error}" for error in ex.errors]

    if errors:
        raise ConfigError(errors)

    return frozenset(frozen)


def _layer_names(encoder: Module, stacks: Sequence[str]) -> list[str]:
    layers = []
    for stack in stacks:
        module = encoder.get_submodule(stack)
        assert isinstance(module, ModuleList)
        layers += [f"{stack}.{idx}." for idx in range(len(module))]
    return layers


def _before(names: Sequence[str], layers: Sequence[str], num_trained: int) -> list[str]:
    """The parameters of all but the last layers, and those that are defined before the first of the last ones.

    Encoders define embeddings before layers, and the last norm, poolers and heads after them.
    """
    first, earlier = layers[-num_trained], tuple(layers[:-num_trained])
    start = next(idx for idx, name in enumerate(names) if name.startswith(first))
    return [name for idx, name in enumerate(names) if idx < start or name.startswith(earlier)]

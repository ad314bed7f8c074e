"""Which parameters of a model keep their values in training. Needs torch only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from torch.nn import Module, ModuleList

from vembed_fs2.errors import ConfigError

_WRAPPER: Final = "_checkpoint_wrapped_module."
"""What activation checkpointing puts into the names of parameters."""


def find_first_parameters(
    model: Module, stacks: Sequence[ModuleList], encoders: Sequence[Sequence[str]], num_layers: int
) -> frozenset[str]:
    """Return the names of the parameters of the first layers, and of what comes before them, of each encoder.

    Models define embeddings before layers, and the last norm, poolers and heads after them.

    :param stacks: the model's stacks of layers, first to last.
    :param encoders: the names of the modules of each encoder; none if the whole model is one.
    :param num_layers: how many layers; with 0, only what comes before them.
    :raises ConfigError: an encoder has fewer layers.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    layers = [f"{paths[id(stack)]}.{idx}." for stack in stacks for idx in range(len(stack))]
    names = [plain_name(name) for name, _ in model.named_parameters()]

    found: set[str] = set()
    errors = []
    for modules in encoders or [[""]]:
        own = [name for name in names if _is_within(name, modules)]
        own_layers = [layer for layer in layers if _is_within(layer, modules)]
        what = f"`{'`, `'.join(modules)}`" if encoders else "the model"
        if not own_layers:
            errors.append(f"{what} has no layers: name what to freeze in `params`.")
        elif num_layers > len(own_layers):
            errors.append(f"`layers` must be at most {len(own_layers)}, which {what} has, but is {num_layers} instead.")
        else:
            start = next(idx for idx, name in enumerate(own) if name.startswith(own_layers[0]))
            found.update(own[:start])
            found.update(name for name in own if name.startswith(tuple(own_layers[:num_layers])))

    if errors:
        raise ConfigError(errors)
    return frozenset(found)


def _is_within(name: str, modules: Sequence[str]) -> bool:
    return any(module == "" or name.startswith(f"{module}.") for module in modules)


def find_matches(names: Sequence[str], patterns: Iterable[str]) -> frozenset[str]:
    """Return the names whose beginnings match one of the regular expressions.

    :raises ConfigError: lists the patterns that match nothing.
    """
    found = {pattern: [name for name in names if re.match(pattern, name)] for pattern in patterns}
    if errors := list(_unmatched(found, names)):
        raise ConfigError(errors)
    return frozenset(name for matches in found.values() for name in matches)


def _unmatched(found: dict[str, list[str]], names: Sequence[str]) -> Iterator[str]:
    for pattern, matches in found.items():
        if not matches:
            yield f"'{pattern}' matches no parameter; the first one is '{names[0]}'."


def stop_dropout(module: Module, frozen: frozenset[str], prefix: str = "") -> None:
    """Put the parts whose parameters are all frozen into evaluation mode: they only compute features."""
    names = {plain_name(name) for name, _ in module.named_parameters(prefix)}
    if names and names <= frozen:
        module.eval()
        return
    for name, child in module.named_children():
        stop_dropout(child, frozen, f"{prefix}.{name}" if prefix else name)


def plain_name(name: str) -> str:
    """The name of a parameter or buffer as it is without activation checkpointing."""
    return name.replace(_WRAPPER, "")

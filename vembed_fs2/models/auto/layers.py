"""Finds the layers of any model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch.nn import Module, ModuleList, Sequential


def find_layer_stacks(model: Module, calls: Counter[str]) -> Iterator[ModuleList]:
    """Find the lists of layers: lists of modules that transformers itself does not split between devices.

    Where it names nothing, they are the outermost lists of modules of one class.

    :param calls: how often each module is called, by its name: FSDP2 shards and activation
        checkpointing wraps only what is.
    """
    unsplit = {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
    yield from _find_stacks(model, "", unsplit, calls)


def _find_stacks(module: Module, path: str, unsplit: set[str], calls: Counter[str]) -> Iterator[ModuleList]:
    for name, child in module.named_children():
        where = f"{path}{name}."
        inside = any(_is_named(m, unsplit) for m in child.modules() if m is not child)
        if _is_stack(child, where, calls) and (_is_named(child, unsplit) or not inside):
            yield child  # type: ignore[misc]  # Items of a `Sequential` are replaced in the same way.
        else:
            yield from _find_stacks(child, where, unsplit, calls)


def _is_stack(module: Module, path: str, calls: Counter[str]) -> bool:
    if not isinstance(module, (ModuleList, Sequential)) or len(module) == 0:
        return False

    are_called = all(calls[f"{path}{name}"] > 0 for name, _ in module.named_children())

    # A layer has several modules with parameters; a list of projections is not a list of layers.
    are_layers = all(sum(bool(m._parameters) for m in layer.modules()) > 1 for layer in module)
    return are_called and are_layers and len({type(layer) for layer in module}) == 1


def _is_named(module: Module, names: set[str]) -> bool:
    return isinstance(module, (ModuleList, Sequential)) and any(type(layer).__name__ in names for layer in module)

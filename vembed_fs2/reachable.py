"""Finds the modules and tensors that a callable uses. Needs torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, Final

from torch import Tensor
from torch.nn import Module, Parameter


def find_reachable(source: Any, is_wanted: Callable[[Any], bool]) -> Iterator[Any]:
    """Yield what ``source`` uses and ``is_wanted`` accepts: modules, functions, containers and tensors.

    A function uses what it closes over, its defaults, and the modules and
    neighbouring functions that it names; an object uses its attributes. Nothing is
    sought within what is wanted.
    """
    yield from _search(source, is_wanted, set())


def find_module_with(source: Any, method: str) -> Any:
    """Return the outermost module that ``source`` uses and that has a method of this name, if there is one."""

    def is_wanted(value: Any) -> bool:
        return isinstance(value, Module) and callable(getattr(value, method, None))

    return next(find_reachable(source, is_wanted), None)


def _search(source: Any, is_wanted: Callable[[Any], bool], seen: set[int]) -> Iterator[Any]:
    if id(source) in seen:
        return

    seen.add(id(source))

    if is_wanted(source):
        yield source
        return

    for value in _parts_of(source):
        yield from _search(value, is_wanted, seen)


def _parts_of(source: Any) -> Iterable[Any]:
    """What a callable, a container or a dataclass holds that may be, or may hold, a module."""
    if isinstance(source, Module):
        return (*source.children(), *_holders_of(source))
    if isinstance(source, MethodType):
        return (source.__func__, source.__self__, *_attributes_of(source.__self__))
    if isinstance(source, FunctionType):
        return _used_by(source)
    if isinstance(source, partial):
        return (source.func, *source.args, *source.keywords.values())
    if isinstance(source, _CONTAINERS):
        return _elements_of(source)
    if callable(source) or _is_record(source):
        return _attributes_of(source)

    return ()


_CONTAINERS: Final = (dict, list, tuple, set, frozenset)

_PLAIN: Final = frozenset([bool, int, float, str, bytes, type(None), Tensor, Parameter])
"""What most attributes are; told apart from containers at once."""

_MANY: Final = 1000
"""Containers with more elements hold data: nothing is sought in containers within them. This is asked in each step."""

_OWN_ATTRIBUTES: Final = frozenset(vars(Module()))
"""The attributes in which a module keeps its parameters, children and hooks."""


def _elements_of(container: Any) -> list[Any]:
    values = container.values() if isinstance(container, dict) else container
    is_data = len(container) > _MANY
    return [v for v in values if callable(v) or (not is_data and _is_holder(v))]


def _attributes_of(source: Any) -> list[Any]:
    return [*(v for v in _attributes(source).values() if isinstance(v, Module)), *_holders_of(source)]


def _holders_of(source: Any) -> list[Any]:
    return [v for name, v in _attributes(source).items() if _is_holder(v) and name not in _OWN_ATTRIBUTES]


def _attributes(source: Any) -> dict[str, Any]:
    if _is_record(source) and not hasattr(source, "__dict__"):  # A dataclass with slots.
        return {f.name: getattr(source, f.name, None) for f in fields(source)}
    return getattr(source, "__dict__", {})


def _is_holder(value: Any) -> bool:
    return type(value) not in _PLAIN and (isinstance(value, _CONTAINERS) or _is_record(value))


def _is_record(source: Any) -> bool:
    return is_dataclass(type(source)) or isinstance(source, SimpleNamespace)


def _used_by(function: FunctionType) -> Iterator[Any]:
    """What a function closes over, and the modules, containers of them and neighbouring functions that it names."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()

    for cell in function.__closure__ or ():
        with suppress(ValueError):  # Not assigned yet.
            yield cell.cell_contents

    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if (
            isinstance(value, Module)
            or _is_holder(value)
            or getattr(value, "__globals__", None) is function.__globals__
        ):
            yield value

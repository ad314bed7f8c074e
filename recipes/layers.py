"""Merges the layers of a configuration and lists everything that is wrong with the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from fairseq2.utils.config import ReplacePathDirective, StandardConfigMerger, StandardConfigProcessor
from fairseq2.utils.structured import StandardValueConverter, StructureError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from vembed_fs2.errors import ConfigError, did_you_mean

ComponentConfigs = Callable[[str, str], "type[object] | None"]
"""``(section path, component name)`` -> the class of its configuration; raises ``ConfigError`` if there is none."""


def parse_yaml(text: str) -> Any:
    """Parse YAML 1.2, as fairseq2 does: ``1e-5`` is a number, and ``on`` is a string."""
    return YAML(typ="safe", pure=True).load(text)


def load_yaml(file: Path) -> Mapping[str, Any]:
    """Read a configuration file. ``${dir}`` in it is its own folder.

    :raises ConfigError: it cannot be read, or is not a mapping.
    """
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as ex:
        raise ConfigError(f"the file cannot be read: {ex.strerror}", where=str(file)) from None
    except (UnicodeDecodeError, YAMLError) as ex:
        raise ConfigError(f"not valid YAML: {_yaml_problem(ex)}", where=str(file)) from None

    if not isinstance(content, dict):
        raise ConfigError("it must hold keys and values", where=str(file))

    processed = StandardConfigProcessor([]).process(content, [ReplacePathDirective(file.resolve().parent)])
    assert isinstance(processed, Mapping)
    return processed


def _yaml_problem(ex: Exception) -> str:
    """Say in one line what is wrong, and in which line of a file."""
    if not isinstance(ex, MarkedYAMLError) or ex.problem is None or ex.problem_mark is None:
        return str(ex).partition("\n")[0]
    return f"{ex.problem} in line {ex.problem_mark.line + 1}, column {ex.problem_mark.column + 1}"


def parse_overrides(items: Sequence[str]) -> Mapping[str, Any]:
    """Parse ``a.b=1`` items, and ``del:a.b``, to nested keys.

    :raises ConfigError: an item has no ``=``, or its value is not valid YAML.
    """
    overrides: dict[str, Any] = {}
    errors = []
    for item in items:
        if item.startswith("del:"):
            *parents, key = item[4:].split(".")
            _node(overrides, parents).setdefault("_del_", []).append(key)
            continue

        name, sign, text = item.partition("=")
        if not sign or not name.strip():
            errors.append(f"'{item}' must have the form KEY=VALUE.")
            continue

        try:
            value = parse_yaml(text)
        except YAMLError as ex:
            errors.append(f"The value of '{item}' is not valid YAML: {_yaml_problem(ex)}.")
            continue

        *parents, key = name.strip().split(".")
        _node(overrides, parents)[key] = value

    if errors:
        raise ConfigError(errors, where="--config")

    return overrides


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested ones, in which they may be mixed: ``{"a.b": 1, "a": {"c": 2}}``.

    :raises ConfigError: a key is not a text.
    """
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise ConfigError(f"{name!r} must be a text, because it is a key.")

        *parents, key = name.split(".")
        node = _node(nested, parents)
        if isinstance(value, Mapping):
            _node(node, [key]).update(nest(value))
        else:
            node[key] = value

    return nested


def _node(root: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    for key in keys:
        child = root.get(key)
        if not isinstance(child, dict):
            child = root[key] = {}
        root = child
    return root


def merge_layers(base: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Lay each layer over what is below it.

    A layer that names another component (``loss.name``) starts from that
    component's own defaults, not from the values of the one below.

    :raises ConfigError: a layer deletes a key that there is not, or fairseq2's ``_del_`` or ``_set_`` is misused.
    """
    merger = StandardConfigMerger()
    merged: Any = base
    for layer in layers:
        if errors := list(_find_directive_errors(merged, layer, "")):
            raise ConfigError(errors)
        merged = merger.merge(_without_replaced(merged, layer), layer)

    assert isinstance(merged, Mapping)
    return merged


def _find_directive_errors(below: Mapping[str, Any], layer: Mapping[str, Any], path: str) -> Iterator[str]:
    """Return what is wrong with the keys that say what to do with other keys."""
    deleted = layer.get("_del_", [])
    if not isinstance(deleted, list):
        yield f"`{path}_del_` must be a list of keys, but is {deleted!r}."
    else:
        for key in deleted:
            if key not in below:
                hint = did_you_mean(str(key), map(str, below), form=f"`{path}{{}}`".format)
                yield f"`{path}{key}` cannot be deleted, because there is no such key.{hint}"

    if not isinstance(values := layer.get("_set_", {}), Mapping):
        yield f"`{path}_set_` must hold keys and values, but is {values!r}."

    for key, section in layer.items():
        if isinstance(section, Mapping):
            under = below.get(key)
            yield from _find_directive_errors(under if isinstance(under, Mapping) else {}, section, f"{path}{key}.")


def _without_replaced(below: Mapping[str, Any], layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the layer below, without the configurations of components that this layer replaces, at any depth."""
    cleaned = dict(below)
    if "config" in below and layer.get("name", below.get("name")) != below.get("name"):
        cleaned["config"] = {}

    for key, section in layer.items():
        if isinstance(section, Mapping) and isinstance(cleaned.get(key), Mapping):
            cleaned[key] = _without_replaced(cleaned[key], section)

    return cleaned


def structure(kls: type[Any], values: Mapping[str, Any], component_config: ComponentConfigs, path: str = "") -> Any:
    """Convert nested keys to ``kls``.

    :param path: what the keys are below of, with a dot at its end.
    :raises ConfigError: lists every unknown key, with the nearest known one, and every value of a wrong type.
    """
    errors = list(_find_errors(kls, values, path, component_config))
    if errors:
        raise ConfigError(errors)
    return StandardValueConverter().structure(values, kls)


def structure_sections(
    kls: type[Any], values: Mapping[str, Any], component_config: ComponentConfigs
) -> dict[str, object]:
    """Convert the sections of ``kls`` that have no errors, by name, of values that :func:`structure` refuses."""
    sections = {}
    for name, hint in get_type_hints(kls).items():
        section, value = _section_of(hint), values.get(name)
        if not (is_dataclass(section) and isinstance(section, type) and isinstance(value, Mapping)):
            continue
        if not any(_find_errors(section, value, f"{name}.", component_config)):
            sections[name] = StandardValueConverter().structure(value, section)

    return sections


def _find_errors(kls: type[Any], values: Mapping[str, Any], path: str, components: ComponentConfigs) -> Iterator[str]:
    hints = get_type_hints(kls)
    names = [f.name for f in fields(kls)]
    selector = _selector(names, hints)
    for key, value in values.items():
        where = f"{path}{key}"
        if key not in names:
            yield _unknown_key(where, str(key), path, kls, names)
        elif key != "config" or selector is None:
            yield from _find_value_errors(value, hints[key], where, components)

    if selector is not None:
        yield from _find_component_errors(values.get("config", {}), values.get(selector), path, components)

    for field in fields(kls):
        if field.name not in values and field.default is field.default_factory is MISSING:
            yield f"`{path}{field.name}` is missing."


def _selector(names: Sequence[str], hints: Mapping[str, Any]) -> str | None:
    """The field that selects the class of ``config``: ``family`` for models, ``name`` for components."""
    if hints.get("config") is not object:
        return None
    return next((name for name in ("family", "name") if name in names), None)


def _find_value_errors(value: Any, hint: Any, where: str, components: ComponentConfigs) -> Iterator[str]:
    if value is not None:
        hint = _section_of(hint)

    if is_dataclass(hint) and isinstance(value, Mapping):
        assert isinstance(hint, type)
        yield from _find_errors(hint, value, f"{where}.", components)
    elif is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]
        yield f"`{where}` must hold keys and values, but is {value!r}."
    elif get_origin(hint) is Sequence and isinstance(value, (list, tuple)):
        for idx, element in enumerate(value):
            yield from _find_value_errors(element, get_args(hint)[0], f"{where}[{idx}]", components)
    elif error := _type_error(value, hint, where):
        yield error


def _section_of(hint: Any) -> Any:
    """The class of a section that may be null; any other hint as it is."""
    options = [option for option in get_args(hint) if option is not type(None)]
    return options[0] if isinstance(hint, UnionType) and len(options) == 1 and is_dataclass(options[0]) else hint


def _find_component_errors(value: Any, name: Any, path: str, components: ComponentConfigs) -> Iterator[str]:
    if not isinstance(name, str):
        return  # Missing, or found to be of a wrong type.

    try:
        kls = components(path.rstrip("."), name)
    except ConfigError as ex:
        yield from ex.errors
        return

    if kls is None or not is_dataclass(kls):
        return

    if isinstance(value, Mapping):
        yield from _find_errors(kls, value, f"{path}config.", components)
    elif not isinstance(value, kls):
        yield f"`{path}config` must hold keys and values, but is {value!r}."


def _unknown_key(where: str, key: str, path: str, kls: type[Any], names: Sequence[str]) -> str:
    if hint := did_you_mean(key, names, form=f"`{path}{{}}`".format):
        return f"`{where}` is not a known key.{hint}"

    for found in _find_key(kls, key, path):
        return f"`{where}` is not a known key. Did you mean `{found}`?"
    return f"`{where}` is not a known key. Known here: {', '.join(names)}."


def _find_key(kls: type[Any], key: str, path: str) -> Iterator[str]:
    """The other places in the tree that have a key of that name."""
    for name, hint in get_type_hints(kls).items():
        hint = _section_of(hint)

        if name == key:
            yield f"{path}{name}"
        if is_dataclass(hint) and isinstance(hint, type):
            yield from _find_key(hint, key, f"{path}{name}.")


def _type_error(value: Any, hint: Any, where: str) -> str | None:
    if isinstance(value, str) and get_origin(hint) is Sequence:
        return f"`{where}` must be a list, but is {value!r}. Write [{value}]."  # Else each letter is an element.

    kinds = {*get_args(hint), hint}
    is_number = isinstance(value, (int, float))

    if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
        return f"`{where}` must be {_describe(hint)}, but is {value!r}."

    # A fraction would be cut off.
    if is_number and int in kinds and float not in kinds and value != value // 1:
        return f"`{where}` must be {_describe(hint)}, but is {value!r}."

    try:
        StandardValueConverter().structure(value, hint)
    except StructureError:
        return f"`{where}` must be {_describe(hint)}, but is {value!r}."

    return None


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if all(option in names for option in options):
        return " or ".join(names[option] for option in options)

    text = hint.__name__ if isinstance(hint, type) else str(hint)
    for name in ("collections.abc.", "typing.", "pathlib.", "torch."):
        text = text.replace(name, "")

    if text.startswith("Literal["):
        return "one of " + text[8:-1]

    return f"of type {text}"

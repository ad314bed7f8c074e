"""Rotary positions as version 5 of transformers writes them, in the words of version 4.

Version 5 keeps all of them in one field, ``rope_parameters``; layers of several
types have an entry each. Version 4 reads ``rope_theta``, ``rope_scaling`` and a few
others, and would ignore the field: models would compute with its defaults.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Final

from vembed_fs2.errors import ModelLoadError

ROPE_PARAMETERS: Final = "rope_parameters"
"""The field of version 5."""

_ALIASES: Final[Mapping[str, Sequence[str]]] = {
    "rope_theta": ("rope_theta", "global_rope_theta", "rotary_emb_base"),
    "local_theta": ("rope_local_base_freq", "local_rope_theta"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
"""What classes of version 4 call a field, by the name that most of them have, or that is ours."""

LENGTH: Final = "original_max_position_embeddings"
"""The longest text of the pretraining, a field that functions of all models read."""

_SECTIONS: Final = "mrope_section"
"""A field of positions that are not stretched, but are over time, height and width."""

_STRETCHES_FULL_LAYERS: Final = ("olmo3",)
"""Model types whose layers have one base, and whose positions are stretched in layers without a window only."""

_FULL: Final = "full_attention"
_SLIDING: Final = "sliding_attention"


def create_config(hf_config: Mapping[str, Any], kls: Any) -> tuple[Any, dict[str, Any]]:
    """Create the configuration that ``config.json`` describes.

    :param kls: a subclass of ``transformers.PretrainedConfig``.
    :returns: the configuration; and the fields of version 4 that stand for ``rope_parameters``, by name.
    :raises ModelLoadError: it is not valid, or version 4 has no word for something; the message names the field.
    """
    error: Exception | None = None
    for fields in _list_spellings(hf_config, kls):
        values = {name: value for name, value in hf_config.items() if name != ROPE_PARAMETERS or not fields} | fields
        try:
            return kls.from_dict(deepcopy(values)), fields
        except (TypeError, ValueError, AttributeError, LookupError) as ex:
            error = error or ex

    raise ModelLoadError(f"config.json is not a valid {kls.__name__}: {error}")


def _list_spellings(hf_config: Mapping[str, Any], kls: Any) -> Iterator[dict[str, Any]]:
    parameters = hf_config.get(ROPE_PARAMETERS)
    if parameters is None or ROPE_PARAMETERS in inspect.signature(kls.__init__).parameters:
        yield {}
        return
    if not isinstance(parameters, Mapping):
        raise ModelLoadError(f"config.json: `{ROPE_PARAMETERS}` must hold fields by name, but is {parameters!r}.")

    # Most classes call the kind of positions `rope_type`; older ones want `type` and nothing else.
    for kind in ("rope_type", "type"):
        yield _to_version_4(hf_config, parameters, kls, kind)


def require_read(hf_config: Mapping[str, Any], fields: Mapping[str, Any], config_kls: Any, kls: Any) -> None:
    """Check that a model obeys the fields that stand for ``rope_parameters``.

    :param fields: what :func:`create_config` returned.
    :param config_kls: the class of the configuration.
    :param kls: the class of the model.
    :raises ModelLoadError: it does not; the message names the field.
    """
    known = inspect.signature(config_kls.__init__).parameters
    for name in fields:
        if name not in (*known, LENGTH) and name not in inspect.getsource(sys.modules[kls.__module__]):
            raise ModelLoadError(
                f"config.json: `{ROPE_PARAMETERS}` is {hf_config[ROPE_PARAMETERS]!r}, which is not supported:"
                f" transformers' {kls.__name__} has no `{name}`."
            )


def _to_version_4(values: Mapping[str, Any], parameters: Mapping[str, Any], kls: Any, kind: str) -> dict[str, Any]:
    """
    :param kind: what the class calls the kind of positions.
    """
    known = inspect.signature(kls.__init__).parameters

    # A field of version 4 beside it comes first in version 5 as well.
    older = values.get("rope_scaling") or {}
    fields: dict[str, Any] = {}

    if bool(parameters) and all(isinstance(value, (Mapping, type(None))) for value in parameters.values()):
        parameters, local = _choose_entries(parameters, values, kls)
        parameters = {**parameters, **older}
        parameters.pop("truncate", None)  # Version 5 looks for it beside the entries.
        if local:
            fields[_find_name("local_theta", known)] = local["rope_theta"]
    elif older:
        parameters = older

    scaling = {name: value for name, value in parameters.items() if name not in ("type", "rope_type")}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))

    for name in ("rope_theta", "partial_rotary_factor"):
        value = scaling.pop(name, values.get(name))
        if value is not None:
            fields[_find_name(name, known)] = value

    if rope_type == "longrope":
        fields |= _move_length(scaling, values)
    if rope_type != "default" or _SECTIONS in scaling:
        fields["rope_scaling"] = {kind: rope_type, **scaling}

    return fields


def _find_name(name: str, known: Container[str]) -> str:
    return next((alias for alias in _ALIASES[name] if alias in known), name)


def _choose_entries(
    parameters: Mapping[str, Any], values: Mapping[str, Any], kls: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entry of all layers; and another one of layers with a window, empty if there is none.

    :raises ModelLoadError: there is no such pair.
    """
    entries = {name: dict(entry) for name, entry in parameters.items() if entry is not None}
    full, local = entries.get(_FULL, {}), entries.get(_SLIDING, {})
    is_plain = not local.keys() - {"rope_type", "rope_theta"} and local.get("rope_type", "default") == "default"

    if entries.keys() <= {_FULL, _SLIDING} and is_plain:
        if _find_name("local_theta", inspect.signature(kls.__init__).parameters) != "local_theta":
            return full, local if "rope_theta" in local else {}
        if kls.model_type in _STRETCHES_FULL_LAYERS and full.get("rope_theta") == local.get("rope_theta"):
            return full, {}

    used = [entries.get(name) for name in set(values.get("layer_types") or entries)]
    if used[0] is not None and all(entry == used[0] for entry in used):
        return used[0], {}

    raise ModelLoadError(f"config.json: `{ROPE_PARAMETERS}` is {dict(parameters)!r}, which is not supported.")


def _move_length(scaling: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Take the length of pretraining out of ``scaling``: version 4 wants it outside, and works the factor out by it."""
    limit = values.get("max_position_embeddings")
    length = values.get(LENGTH, scaling.get(LENGTH, limit))
    scaling.pop(LENGTH, None)
    if length is None or limit is None:
        return {}

    factor = scaling.pop("factor", None)
    if factor is not None and factor != limit / length and scaling.get("attention_factor") is None:
        scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0

    return {LENGTH: length}

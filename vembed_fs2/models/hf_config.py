"""Reads fields of transformers' ``config.json``; nothing that changes what a model computes is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.family import config_errors


def resolve_hf_config(hf_config: Mapping[str, Any], kls_name: str) -> dict[str, Any]:
    """Return the content of ``config.json`` as transformers' class sees it, with its defaults and other names.

    :raises ModelLoadError: the class does not take the content.
    """
    import transformers

    try:
        resolved: dict[str, Any] = getattr(transformers, kls_name)(**deepcopy(dict(hf_config))).to_dict()
    except (TypeError, ValueError, AttributeError) as ex:
        raise ModelLoadError(f"config.json is not a valid {kls_name}: {ex}.") from None
    return resolved


def refuse_other_values(hf_config: Mapping[str, Any], supported: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse fields with other values than those that are supported.

    :raises ModelLoadError: there is one; the message names it.
    """
    for name, values in supported.items():
        if name in hf_config and hf_config[name] not in values:
            raise ModelLoadError(f"config.json: `{name}` is {hf_config[name]!r}, which is not supported.")


def read_field(hf_config: Mapping[str, Any], name: str, kls: type, *, optional: bool = False) -> Any:
    """Return the value of a field.

    :param optional: whether it may be null.
    :raises ModelLoadError: it is not of type ``kls``.
    """
    value = hf_config[name]
    if value is None and optional:
        return None
    if kls is float and type(value) is int:
        return float(value)
    if type(value) is not kls:
        raise ModelLoadError(f"config.json: `{name}` must be of type {kls.__name__}, but is {value!r} instead.")
    return value


def validate_hf_config(config: object, names: Mapping[str, str]) -> None:
    """Validate a configuration that was read.

    :param names: what ``config.json`` calls the fields of ``config``.
    :raises ModelLoadError: it is not valid; the message has the names of ``config.json``.
    """
    if errors := config_errors(config):
        message = " ".join(errors)
        for name, hf_name in names.items():
            message = message.replace(f"`{name}`", f"`{hf_name}`")
        raise ModelLoadError(f"config.json is not valid. {message}")

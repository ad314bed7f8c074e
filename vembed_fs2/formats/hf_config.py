"""Reads transformers' ``config.json``, and names of tensors that families share.

Nothing in ``config.json`` that changes what a model computes is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from copy import deepcopy
from typing import Any, Final

from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.checkpoint import config_errors
from vembed_fs2.formats.key_map import Rename, Rule

_DUAL_LAYER_KEYS: Final = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.out_proj": "self_attn.output_proj",
    "layer_norm1": "self_attn_layer_norm",
    "mlp.fc1": "ffn.inner_proj",
    "mlp.fc2": "ffn.output_proj",
    "layer_norm2": "ffn_layer_norm",
}

_DUAL_REFUSED: Final = ("pruned_heads", "quantization_config")
"""Fields that transformers would obey and that have no counterpart here."""


def resolve_hf_config(hf_config: Mapping[str, Any], kls_name: str, kind: str | None = None) -> dict[str, Any]:
    """Return the content of ``config.json`` as transformers' class sees it, with its defaults and other names.

    :param kind: the kind of model, for the error; the name of the class, if ``None``.
    :raises ModelLoadError: the class does not take the content.
    """
    import transformers

    try:
        resolved: dict[str, Any] = getattr(transformers, kls_name)(**deepcopy(dict(hf_config))).to_dict()
    except (TypeError, ValueError, AttributeError) as ex:
        kind = kind or kls_name.removesuffix("Config")
        raise ModelLoadError(f"config.json is not a valid {kind} configuration: {ex}.") from None

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
        message = re.sub(r"`([\w.]+)`", lambda match: f"`{_rename_path(match[1], names)}`", " ".join(errors))
        raise ModelLoadError(f"config.json is not valid. {message}")


def _rename_path(path: str, names: Mapping[str, str]) -> str:
    return ".".join(names.get(name, name) for name in path.split("."))


def create_dual_rules(names: Mapping[str, str]) -> list[Rule]:
    """Add the names of the layers' tensors, for a model with a ``text_model`` and a ``vision_model``.

    :param names: what the names of all others start with, and what that is here.
    """
    rules: list[Rule] = [Rename(theirs, ours) for theirs, ours in names.items()]
    for tower in ("text", "vision"):
        for theirs, ours in _DUAL_LAYER_KEYS.items():
            rules.append(Rename(f"{tower}_model.encoder.layers.*.{theirs}.", f"{tower}.encoder.layers.*.{ours}."))
    return rules


def refuse_dual_options(where: str, values: Mapping[str, Any], kind: str) -> None:
    """Refuse fields that transformers would obey, and we not.

    :param kind: the kind of model, for the error.
    :raises ModelLoadError: one is set; the message names it.
    """
    for name in _DUAL_REFUSED:
        if values.get(name):
            raise ModelLoadError(f"`{where}{name}` is not supported for {kind} models.")


def read_fields(
    values: Mapping[str, Any], names: Mapping[str, str], default: object, where: str, *, optional: Container[str] = ()
) -> dict[str, Any]:
    """Rename fields.

    :param names: the fields of ``values``, and what they are called here.
    :param default: a configuration; values must be of the types of its fields.
    :param optional: the fields of ``values`` that may be null.
    :raises ModelLoadError: a value is of another type, or an activation function is not known.
    """
    fields: dict[str, Any] = {}
    for hf_name, name in names.items():
        value = values[hf_name]
        kind = type(getattr(default, name))
        if kind is float and type(value) is int:
            value = float(value)

        if type(value) is not kind and not (hf_name in optional and value is None):
            raise ModelLoadError(
                f"`{where}{hf_name}` must be of type `{kind.__name__}`, but is {value!r}, which is not supported."
            )

        if hf_name == "hidden_act":
            create_activation(value, field=where + hf_name)

        fields[name] = value

    return fields


def write_fields(config: object, names: Mapping[str, str]) -> dict[str, object]:
    """The reverse of :func:`read_fields`."""
    return {hf_name: getattr(config, name) for hf_name, name in names.items()}

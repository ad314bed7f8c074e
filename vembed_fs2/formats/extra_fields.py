"""Fields of configuration files that have no counterpart here: kept when read, given back when written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fairseq2.models.hg import HuggingFaceConfig

_WRITTEN_ANEW: Final = frozenset(
    {"architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version"}
)
"""What a file says about itself, about its weights, and about code beside it, which is not written."""


def find_extra_fields(
    content: Mapping[str, Any], written: Mapping[str, Any], known: Mapping[str, object]
) -> dict[str, object]:
    """Return the fields of a file that would be lost if it were written again.

    :param content: the content of the file.
    :param written: what would be written in its place.
    :param known: the fields that have a counterpart, in every spelling. The value of a nested configuration is a
        mapping of its own fields.
    """
    extra: dict[str, object] = {}
    for name, value in content.items():
        if name in _WRITTEN_ANEW:
            continue

        inner, nested = written.get(name), known.get(name)
        if isinstance(nested, Mapping) and isinstance(value, Mapping):
            found = find_extra_fields(value, inner if isinstance(inner, Mapping) else {}, nested)
            if found:
                extra[name] = found
        elif name not in known and not (name in written and _is_equal(inner, value)):
            extra[name] = value

    return extra


def add_extra_fields(
    written: Mapping[str, Any], extra: Mapping[str, Any], known: Mapping[str, object]
) -> dict[str, Any]:
    """Return what is to be written, with the fields that :func:`find_extra_fields` found.

    :param known: as there. A field of it is what it is here.
    """
    values = dict(written)
    for name, value in extra.items():
        nested = known.get(name)
        if isinstance(nested, Mapping) and isinstance(value, Mapping):
            values[name] = add_extra_fields(values.get(name, {}), value, nested)
        elif name not in known:
            values[name] = value

    return values


def with_extra_fields(exported: HuggingFaceConfig, config: object, file: str = "config.json") -> HuggingFaceConfig:
    """Add the extra fields of ``config`` for fairseq2's own export, which takes what transformers' class has."""
    import transformers

    extra = getattr(config, "extra_fields", {}).get(file, {})
    data = dict(exported.data)
    kls = getattr(transformers, exported.kls_name)
    for name, value in extra.items():
        nested = data.get(name)
        if isinstance(nested, transformers.PretrainedConfig):
            for inner_name, inner in value.items():
                if _is_plain(type(nested), inner_name):
                    setattr(nested, inner_name, inner)
        elif name not in data and _is_plain(kls, name):
            data[name] = value

    return HuggingFaceConfig(data, kls_name=exported.kls_name, arch=exported.arch)


def _is_plain(kls: Any, name: str) -> bool:
    """Whether transformers' class has the field, as an attribute that anybody may set."""
    return not name.startswith("_") and name in vars(kls())


def _is_equal(a: object, b: object) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)

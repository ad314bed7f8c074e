"""Presets: the packaged configurations of a recipe. Light: ``--preset list`` must not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from vembed_fs2.errors import ConfigError, did_you_mean


def presets_of(package: str) -> dict[str, Path]:
    """Return the presets of a recipe, by name."""
    folder = Path(str(files(package) / "configs"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def describe_presets(package: str) -> str:
    """List the presets with what the first line of each file says: a comment, so that it is a configuration as well."""
    presets = presets_of(package)
    width = max(map(len, presets), default=0)
    lines = []
    for name, file in presets.items():
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"{name:<{width}}  {first.removeprefix('#').strip() if first.startswith('#') else ''}".rstrip())
    return "\n".join(lines)


def load_preset(package: str, name: str, where: str = "--preset") -> Mapping[str, Any]:
    """Read a preset.

    :param where: what the error calls the place of the name.
    :raises ConfigError: there is none of that name.
    """
    from vembed_fs2.recipes.layers import load_yaml

    presets = presets_of(package)
    if name not in presets:
        hint = did_you_mean(name, presets) or f" Presets: {', '.join(presets) or 'none'}."
        raise ConfigError(f"'{name}' is not a preset.{hint}", where=where)
    return load_yaml(presets[name])

"""The components that a configuration names: an optimizer, a schedule, an objective."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from fairseq2.utils.structured import StandardValueConverter

from vembed_fs2.errors import ConfigError, did_you_mean
from vembed_fs2.fairseq2_seams import create_recipe_container
from vembed_fs2.recipes.base import VembedRecipe


class Components:
    """Tells of which class the ``config`` of a section is, by the ``name`` in that section."""

    def __init__(self, recipe: VembedRecipe[Any, Any]) -> None:
        self._by_section = recipe.components(create_recipe_container(recipe))

    def find_config(self, section: str, name: str) -> type[object]:
        """Return the configuration class of a component.

        :param section: the path of the section. A component within another one's configuration is of the same kind.
        :raises ConfigError: no component has that name.
        """
        known = self._by_section[section.partition(".")[0]]
        if name in known:
            return known[name]

        hint = did_you_mean(name, known) or f" Known: {', '.join(sorted(known))}."
        raise ConfigError(f"`{section}.name` '{name}' is not known.{hint}")

    def resolve(self, config: object) -> None:
        """Convert the ``config`` of each section that names a component to that component's class."""
        for section in self._by_section:
            value = getattr(config, section, None)
            if value is not None:
                self._resolve(value, section)

    def _resolve(self, component: Any, path: str) -> None:
        kls = self.find_config(path, component.name)
        values = {} if component.config is None else component.config

        component.config = StandardValueConverter().structure(values, kls)
        for name, value in vars(component.config).items():
            for nested in value if isinstance(value, list) else [value]:
                if _is_component(nested):
                    self._resolve(nested, f"{path}.config.{name}")


def _is_component(value: object) -> bool:
    return is_dataclass(value) and {"name", "config"} <= {field.name for field in fields(value)}

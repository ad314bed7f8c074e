"""The base of this package's recipes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, final

from fairseq2.recipe.base import Recipe, RecipeContext
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.task import Task
from typing_extensions import override

from vembed_fs2.console import Screen

ConfigT = TypeVar("ConfigT")

PreparedT = TypeVar("PreparedT")


class VembedRecipe(Recipe, Generic[ConfigT, PreparedT]):
    """A recipe that loads its inputs before it writes anything.

    So a user's mistake is reported before processes connect and before the run's
    folder exists. A run goes through these
    methods in order: :meth:`components`, :meth:`prepare`,
    :meth:`create_prepared_task`, :meth:`show_end`, :meth:`exit_status`.
    """

    screen: Screen = Screen(shown=False)
    """Where the run shows how far it is. The launcher sets it; fairseq2's own programs show the log instead."""

    _opened: tuple[ConfigT, PreparedT] | None = None

    def components(self, resolver: DependencyResolver) -> Mapping[str, Mapping[str, type[object]]]:
        """Return the components that sections of the configuration name, with the classes of their configurations.

        :param resolver: holds what fairseq2, its extensions and this recipe register.
        :returns: a section (``optimizer``) -> the name of a component -> the class of ``<section>.config``.
        """
        return {}

    @abstractmethod
    def prepare(self, config: ConfigT) -> PreparedT:
        """Open what the configuration names, and complete the configuration by what is found.

        Called once in each process.

        :raises VembedError: something that a user wrote, or a file, is wrong.
        """

    def complete(self, prepared: PreparedT, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in what a configuration leaves out and only :meth:`prepare` can know.

        Runs of older versions lack newer keys: before a run is resumed, both
        configurations are completed, and compared.

        :param values: nested values, with the defaults of ``config_kls``.
        :raises ConfigError: the values are not valid any more.
        """
        return values

    @abstractmethod
    def create_prepared_task(self, context: RecipeContext, prepared: PreparedT) -> Task:
        """Create the task on the gang.

        :param prepared: what :meth:`prepare` has returned.
        """

    def show_end(self, output_dir: Path) -> None:
        """Show what the run has made, and what can be done with it; called after a run that has not failed.

        Of a recipe that does not override it, the launcher shows the log.

        :param output_dir: as the user has given it.
        """

    def exit_status(self) -> int:
        """Return the exit status of a run that has not failed; 128 plus the number of a signal that stopped it."""
        return 0

    @final
    def open(self, config: ConfigT) -> PreparedT:
        """Call :meth:`prepare`, unless it has been called for this very configuration."""
        if self._opened is None or self._opened[0] is not config:
            self._opened = (config, self.prepare(config))
        return self._opened[1]

    @final
    @override
    def create_task(self, context: RecipeContext) -> Task:
        # The launcher has opened it before. fairseq2's own programs have not.
        config = cast(ConfigT, context.get_config_as(self.config_kls))
        return self.create_prepared_task(context, self.open(config))


def load_recipe(package: str) -> VembedRecipe[Any, Any]:
    """Return the recipe of a package, which ``create_recipe`` in its module ``recipe`` makes."""
    recipe: VembedRecipe[Any, Any] = import_module(f"{package}.recipe").create_recipe()
    return recipe

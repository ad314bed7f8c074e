"""Errors that a user can cause and can fix. The command line prints them without a stack trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

CONFIGURATION: Final = "The configuration"


class VembedError(Exception):
    """Base of all errors that say what was wrong, where, and what to do."""


class ConfigError(VembedError):
    """A configuration that is not valid; holds every error found, not only the first.

    :param errors: one sentence each.
    """

    def __init__(self, errors: list[str] | str, *, where: str = CONFIGURATION) -> None:
        self.where = where
        self.errors = [errors] if isinstance(errors, str) else list(errors)
        lines = "\n".join(f"  - {e}" for e in self.errors)
        super().__init__(f"{where} is not valid:\n{lines}")


class DataError(VembedError):
    """A row, a file or an image that cannot be used. The message names file and row."""


class ModelLoadError(VembedError):
    """A model folder, card or checkpoint that cannot be loaded."""


class Problems:
    """Collects errors of independent steps, so that all of them are said at once."""

    def __init__(self) -> None:
        self._errors: list[VembedError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep an error of this block for later."""
        try:
            yield
        except VembedError as ex:
            self._errors.append(ex)

    def check(self) -> None:
        """:raises VembedError: the error that was collected, or one that lists all of them."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise ConfigError([text for error in self._errors for text in _sentences(error)])


def _sentences(error: VembedError) -> list[str]:
    if isinstance(error, ConfigError):
        return [text if error.where == CONFIGURATION else f"{error.where}: {text}" for text in error.errors]
    return [str(error)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about a name that is not known: " Did you mean 'x'?", or "" if none is near."""
    from difflib import get_close_matches  # Only a mistake needs it.

    nearest = get_close_matches(name, list(known), 1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""

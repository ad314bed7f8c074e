"""Errors that a user can cause and can fix. The command line prints them without a stack trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

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


def pack_error(error: Exception, message: str, clean: Callable[[str], str] = str) -> dict[str, Any]:
    """Return an error as values that JSON can hold, for another process to raise.

    :param message: what the error says, for errors of other classes than ours as well.
    :param clean: changes each of its texts, for example to take secrets out.
    """
    if isinstance(error, ConfigError):
        return {"kind": "ConfigError", "errors": [clean(e) for e in error.errors], "where": clean(error.where)}

    kind = next((kls.__name__ for kls in (DataError, ModelLoadError) if isinstance(error, kls)), "VembedError")
    return {"kind": kind, "message": clean(message)}


def unpack_error(values: Mapping[str, Any]) -> VembedError:
    """Return the error that :func:`pack_error` was given, or a ``VembedError`` with its message."""
    if values["kind"] == "ConfigError":
        return ConfigError(values["errors"], where=values["where"])

    kinds = {"DataError": DataError, "ModelLoadError": ModelLoadError}
    return kinds.get(values["kind"], VembedError)(values["message"])


def did_you_mean(
    name: str,
    known: Iterable[str],
    *,
    most: int = 1,
    cutoff: float = 0.5,
    form: Callable[[str], str] = "'{}'".format,
) -> str:
    """Return the end of a message about a name that is not known: " Did you mean 'x'?", or "" if none is near.

    :param most: the number of names to suggest.
    :param cutoff: how similar a name must be, from 0 to 1. One that holds ``name`` as a whole word is near as well.
    :param form: how a name is written, in quotes by default.
    """
    names = [form(near) for near in _nearest(name, known, most, cutoff)]
    if not names:
        return ""

    *others, last = names
    return f" Did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def _nearest(name: str, known: Iterable[str], most: int, cutoff: float) -> list[str]:
    from difflib import get_close_matches  # Only a mistake needs it.

    # `BAAI/bge-small` and `baai_bge_small` are written differently only.
    by_spelling = {_spell(k): k for k in known}
    wanted = _spell(name)
    near = get_close_matches(wanted, by_spelling, most, cutoff)
    if not near:
        near = sorted((k for k in by_spelling if f"_{wanted}_" in f"_{k}_"), key=lambda k: (len(k), k))[:most]

    return [by_spelling[k] for k in near]


def _spell(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "_", name.lower())

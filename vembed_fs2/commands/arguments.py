"""Adds what the verbs share to their argument parsers."""

from __future__ import annotations

import argparse

from vembed_fs2.errors import ConfigError


def parse_columns(pairs: list[str]) -> dict[str, str | None]:
    """Parse the values of ``--column``: the column of each field, ``None`` for none.

    :raises ConfigError: one is not of the form FIELD=NAME.
    """
    columns: dict[str, str | None] = {}
    for pair in pairs:
        name, separator, column = pair.partition("=")
        if not separator:
            raise ConfigError(f"`--column` must be FIELD=NAME, but is {pair!r}.", where="The command line")
        columns[name] = column or None
    return columns


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-remote-code``."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the model; read it before",
    )

"""Adds what the verbs share to their argument parsers."""

from __future__ import annotations

import argparse

from vembed_fs2.errors import ConfigError


def parse_columns(pairs: list[str]) -> dict[str, str | list[str] | None]:
    """Parse the values of ``--column``: the column of each field, several if it is given several times, or ``None``.

    :raises ConfigError: one is not of the form FIELD=NAME.
    """
    columns: dict[str, str | list[str] | None] = {}
    for pair in pairs:
        name, separator, column = pair.partition("=")
        if not separator:
            raise ConfigError(f"`--column` must be FIELD=NAME, but is {pair!r}.", where="The command line")

        before = columns.get(name)
        if before is None:
            columns[name] = column or None
        else:
            columns[name] = [*([before] if isinstance(before, str) else before), column]

    return columns


def add_quoting_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--quoting``."""
    parser.add_argument(
        "--quoting",
        choices=("rfc4180", "none"),
        default="rfc4180",
        help="how CSV and TSV files are quoted; none: a quote is a character like any other (default: rfc4180)",
    )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-remote-code``."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the model; read it before",
    )

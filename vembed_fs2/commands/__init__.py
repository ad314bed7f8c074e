"""The verbs of the command line; their modules import nothing heavy."""

from __future__ import annotations

import argparse


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-remote-code``."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the model; read it before",
    )

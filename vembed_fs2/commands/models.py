"""What the verbs of ``fairseq2 vembed models`` share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_json(content: Any) -> None:
    """Print values as JSON."""
    print(json.dumps(content, indent=2))


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of plain text. Lines are as long as they need to be: programs read them as well."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())

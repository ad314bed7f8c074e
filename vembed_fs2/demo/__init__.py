"""The data of the demos. Importing it costs nothing; what is heavy is imported on use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from vembed_fs2.files import write_text


def write_rows(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Write rows as JSONL; the file appears complete or not at all."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

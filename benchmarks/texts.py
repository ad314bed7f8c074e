"""The pairs of texts that benchmarks encode."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is encoded, and by which model."""
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="rows of query and positive (default: documentation, as in the demo)"
    )
    add_model_argument(parser)


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    from vembed_fs2.commands.demo import minilm_folder

    parser.add_argument(
        "--model", type=Path, default=minilm_folder(), metavar="FOLDER", help="default: all-MiniLM-L6-v2"
    )


def write_pairs(out: Path, rows: list[dict[str, str]], count: int) -> None:
    """Write the first ``count`` rows."""
    if len(rows) < count:
        raise SystemExit(f"There are only {len(rows):,} pairs.")
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")


def read_pairs(file: Path | None) -> list[dict[str, str]]:
    """Return the rows of a file, or pairs of Python, NumPy and PyTorch documentation in a fixed random order."""
    if file is not None:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    from vembed_fs2.demo.text import build_pairs

    rows = build_pairs()
    random.Random(0).shuffle(rows)
    return rows


def short_pairs(rows: list[dict[str, str]], count: int, words: int) -> list[tuple[str, str]]:
    """Cut the texts into pairs of neighbouring runs of ``words`` words, all different."""
    pairs: dict[tuple[str, str], None] = {}
    for row in rows:
        text = row["positive"].split()
        for start in range(0, len(text) - 2 * words + 1, 2 * words):
            middle = start + words
            pairs[" ".join(text[start:middle]), " ".join(text[middle : middle + words])] = None
            if len(pairs) == count:
                return list(pairs)
    raise SystemExit(f"The texts give only {len(pairs):,} pairs.")

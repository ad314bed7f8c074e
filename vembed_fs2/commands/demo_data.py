"""``fairseq2 vembed demo data``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="folder that gets train.csv and valid.csv")


def run(args: argparse.Namespace) -> int:
    """Write a table of questions, answers and hard negatives."""
    from vembed_fs2.demo.table import write_table

    for file in write_table(args.output_dir):
        print(file)
    return 0

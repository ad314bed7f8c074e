"""The command line of a recipe. Light: printing help must not import torch."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add fairseq2's recipe arguments, ``--preset`` and ``--nproc-per-node``."""
    parser.add_argument(
        "output_dir", type=Path, nargs="?", metavar="OUTPUT_DIR", help="folder for all that the run writes"
    )
    parser.add_argument("--preset", metavar="NAME", help="start from a packaged configuration; 'list' shows them")
    parser.add_argument(
        "--config-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file; may be given several times",
    )
    parser.add_argument(
        "--config", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="values by dotted key, in YAML"
    )
    parser.add_argument("--dump-config", action="store_true", help="print the configuration and exit")
    parser.add_argument(
        "--nproc-per-node", type=int, metavar="N", help="start N processes on this machine with torchrun"
    )
    parser.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="folder for checkpoints (default: OUTPUT_DIR/checkpoints)"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    shown.add_argument("--verbose", action="store_true", help="show the log instead of the progress")
    parser.add_argument("--no-rich", action="store_true", help="plain lines, no bar that moves")
    parser.add_argument("--traceback", action="store_true", help="show the stack trace of any error")

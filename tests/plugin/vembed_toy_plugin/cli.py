"""The verbs of ``fairseq2 toy``. Light: what prints help imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


class ToyGroup:
    help = "bags of words"

    def main(self, argv: Sequence[str], prog: str) -> int:
        parser = argparse.ArgumentParser(prog=prog)
        verbs = parser.add_subparsers(dest="verb", required=True)
        create = verbs.add_parser("create", help="write a model with random weights")
        create.add_argument("folder", type=Path)
        args = parser.parse_args(argv)

        from vembed_toy_plugin.create import create_model_folder

        create_model_folder(args.folder)
        return 0


TOY = ToyGroup()

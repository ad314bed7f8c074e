"""``fairseq2 vembed export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vembed_fs2.commands.arguments import add_trust_argument
from vembed_fs2.dtypes import DTYPE_NAMES, dtype_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="RUN", help="run, folder, card or repository of the Hugging Face hub")
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--format",
        metavar="LAYOUT",
        default="sentence-transformers",
        help="hf for transformers, sentence-transformers (default; transformers reads it as well), open_clip, or the "
        "layout of a plugin",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="type that the weights are written in (default: float32); bfloat16 halves the folder and rounds them",
    )
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Load the model and write it."""
    from vembed_fs2.console import Screen
    from vembed_fs2.files import check_new_folder
    from vembed_fs2.formats.registry import get_writer
    from vembed_fs2.inference.embedder import Embedder

    check_new_folder(args.output_dir)
    write = get_writer(args.format)
    with Screen() as screen:
        with screen.working(f"Loading {args.model}"):
            embedder = Embedder.load(
                args.model, device="cpu", dtype=args.dtype, trust_remote_code=args.trust_remote_code
            )
        with screen.working(f"Writing {args.output_dir}"):
            write(embedder, args.output_dir)

    print(f"Written to {args.output_dir}, in {dtype_name(embedder.dtype)}.")

    return 0

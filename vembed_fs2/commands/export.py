"""``fairseq2 vembed export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vembed_fs2.commands.arguments import add_trust_argument


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
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Load the model and write it."""
    from vembed_fs2.files import check_new_folder
    from vembed_fs2.formats.registry import get_writer
    from vembed_fs2.inference.embedder import Embedder

    check_new_folder(args.output_dir)
    write = get_writer(args.format)
    write(Embedder.load(args.model, device="cpu", trust_remote_code=args.trust_remote_code), args.output_dir)
    print(f"Written to {args.output_dir}.")

    return 0

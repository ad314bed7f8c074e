"""``fairseq2 vembed export``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="RUN", help="run folder, checkpoint folder, Hugging Face folder or card")
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--format",
        choices=["hf", "sentence-transformers"],
        default="sentence-transformers",
        help="for transformers, or for sentence-transformers (default; transformers reads it as well)",
    )


def run(args: argparse.Namespace) -> int:
    """Load the model and write it."""
    from vembed_fs2.embedder import Embedder
    from vembed_fs2.files import check_new_folder

    check_new_folder(args.output_dir)
    embedder = Embedder.load(args.model, device="cpu")
    if args.format == "hf":
        embedder.save_hf(args.output_dir)
    else:
        embedder.save_sentence_transformers(args.output_dir)
    print(f"Written to {args.output_dir}.")
    return 0

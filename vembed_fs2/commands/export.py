"""``fairseq2 vembed export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vembed_fs2.commands.arguments import add_trust_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="RUN", help="run folder, checkpoint folder, Hugging Face folder or card")
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--format",
        choices=["hf", "sentence-transformers", "open_clip"],
        default="sentence-transformers",
        help="for transformers, for sentence-transformers (default; transformers reads it as well), or for open_clip",
    )
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Load the model and write it."""
    from vembed_fs2.files import check_new_folder
    from vembed_fs2.inference.embedder import Embedder

    check_new_folder(args.output_dir)
    embedder = Embedder.load(args.model, device="cpu", trust_remote_code=args.trust_remote_code)
    if args.format == "hf":
        embedder.save_hf(args.output_dir)
    elif args.format == "open_clip":
        embedder.save_open_clip(args.output_dir)
    else:
        embedder.save_sentence_transformers(args.output_dir)
    print(f"Written to {args.output_dir}.")
    return 0

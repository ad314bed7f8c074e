"""``fairseq2 vembed demo images``."""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

_USE = {
    "clip": """
    from transformers import CLIPModel, CLIPProcessor
    model = CLIPModel.from_pretrained("{folder}")
    processor = CLIPProcessor.from_pretrained("{folder}")""",
    "composed": """
    from vembed_fs2 import Embedder
    embedder = Embedder.load("{folder}")""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--model",
        choices=list(_USE),
        default="clip",
        help="what to train: a CLIP, or a BERT and a DINOv2 composed (default: clip)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the digits and an untrained model, train it, evaluate, export."""
    from vembed_fs2.commands.demo import heading, train
    from vembed_fs2.demo.images import evaluate_digits, write_composed_folder, write_digits, write_model_folder
    from vembed_fs2.evaluation.report import print_results, write_results
    from vembed_fs2.files import check_new_folder
    from vembed_fs2.inference.embedder import Embedder

    out: Path = args.output_dir
    check_new_folder(out)
    started = perf_counter()

    what = "a small CLIP" if args.model == "clip" else "a small BERT and a small DINOv2"
    heading(f"1. Handwritten digits with captions, and {what} with random weights")
    files = write_digits(out / "data")
    write_folder = write_model_folder if args.model == "clip" else write_composed_folder
    write_folder(out / "untrained")
    before = evaluate_digits(Embedder.load(out / "untrained"), out / "data")

    heading("2. Training")

    status = train(out / "run", "demo_images", model=out / "untrained", data=files.train)
    if status:
        return status

    heading("3. Held-out digits")
    embedder = Embedder.load(out / "run")
    after = evaluate_digits(embedder, out / "data")
    print_results({"before": before, "after": after})
    write_results(out / "results.json", {"before": before, "after": after})

    heading("4. Export")
    embedder.save_hf(out / "model")
    print(f"Everything took {perf_counter() - started:.0f} s. Use the model:")
    print(_USE[args.model].format(folder=out / "model"))

    return 0

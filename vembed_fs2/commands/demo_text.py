"""``fairseq2 vembed demo text``."""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Final

SEARCH_LENGTH: Final = 128
"""Texts are cut to so many tokens in both evaluations: they would take half as long again with the model's own 256."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="folder to write; must not exist or be empty")


def run(args: argparse.Namespace) -> int:
    """Build pairs, evaluate, fine-tune, evaluate again, export."""
    from vembed_fs2.commands.demo import heading, minilm_folder, train
    from vembed_fs2.console import Screen
    from vembed_fs2.demo.text import write_pairs
    from vembed_fs2.dtypes import has_fast_bf16
    from vembed_fs2.evaluation.datasets import task_from_files
    from vembed_fs2.evaluation.report import print_results, write_results
    from vembed_fs2.evaluation.retrieval import evaluate_embedder
    from vembed_fs2.files import check_new_folder
    from vembed_fs2.inference.embedder import Embedder
    from vembed_fs2.recipes.evaluate.evaluate import load_embedder
    from vembed_fs2.recipes.evaluate.settings import EvaluateSettings

    out: Path = args.output_dir
    check_new_folder(out)
    started = perf_counter()
    base = minilm_folder()

    heading("1. Pairs from the documentation of Python, NumPy and PyTorch")
    with Screen() as screen, screen.working("Reading the documentation"):
        files = write_pairs(out / "data")
    task = task_from_files(files.queries, files.corpus, files.qrels)
    print(f"{len(task.queries):,} held-out queries over {len(task.corpus):,} documents, in {out / 'data'}")
    settings = EvaluateSettings(max_length=SEARCH_LENGTH, bf16=has_fast_bf16())

    def evaluate(model: Path) -> dict[str, float]:
        with Screen() as screen:
            with screen.working("Loading the model"):
                embedder = load_embedder(str(model), settings)
            return evaluate_embedder(embedder, task, show_progress_bar=screen)

    heading(f"2. all-MiniLM-L6-v2 before training, on the first {SEARCH_LENGTH} tokens of each text")
    before = evaluate(base)
    print_results({"before": before})

    heading("3. One epoch of training")
    train_started = perf_counter()

    status = train(out / "run", "demo_text", model=base, data=files.train)
    if status:
        return status

    train_seconds = perf_counter() - train_started

    heading("4. After training")
    after = evaluate(out / "run")
    print_results({"before": before, "after": after})
    write_results(out / "results.json", {"before": before, "after": after}, train_seconds=train_seconds)

    heading("5. Export")
    Embedder.load(out / "run").save_sentence_transformers(out / "model")
    print(f"Training took {train_seconds:.0f} s, everything {perf_counter() - started:.0f} s. Use the model:\n")
    print("    from sentence_transformers import SentenceTransformer")
    print(f'    model = SentenceTransformer("{out / "model"}")')
    print('    vectors = model.encode(["how to sort a list by a key"])')

    return 0

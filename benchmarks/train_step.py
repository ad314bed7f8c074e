"""The cost of a cached contrastive step: all-MiniLM-L6-v2 on pairs of Python documentation.

Prints seconds per step (median of alternating runs) of the plain step and of
the gradient cache with everything and with nothing kept, their ratio to the
plain step, and the peak memory above that before the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vembed_fs2 import Embedder, GradCache
from vembed_fs2.commands.demo import minilm_folder
from vembed_fs2.data.example import Item
from vembed_fs2.demo.text import write_pairs
from vembed_fs2.losses import InfoNCE, RowInfo
from vembed_fs2.models.embedding import EmbeddingModel, Embeddings, EncoderBatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    embedder = Embedder.load(minilm_folder(), device="cpu")
    query, document = read_pairs(embedder, args.pairs)
    model = embedder.model.train()
    tokens = sum(query.costs()) + sum(document.costs())
    print(
        f"{args.pairs} pairs, {tokens:,} tokens, {torch.get_num_threads()} threads, {'bf16' if args.bf16 else 'fp32'}"
    )

    steps = make_steps(model, args.chunk_tokens)

    def run(step: Callable[[EncoderBatch, EncoderBatch], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            value = step(query, document)
        value.backward()
        model.zero_grad(set_to_none=True)

    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    for round_nr in range(args.repeats + 1):
        for name, step in steps.items():
            seconds, peak = measure(partial(run, step))
            if round_nr > 0:  # The first is a warm-up.
                times[name].append(seconds)
                peaks[name] = max(peaks.get(name, 0.0), peak)
    plain = statistics.median(times["plain"])
    print(f"{'step':<12} {'s':>7} {'ratio':>6} {'peak MiB':>9}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<12} {median:7.2f} {median / plain:6.2f} {peaks[name] / 2**20:9.0f}")


def read_pairs(embedder: Embedder, count: int) -> tuple[EncoderBatch, EncoderBatch]:
    with tempfile.TemporaryDirectory() as folder:
        files = write_pairs(Path(folder))
        rows = [json.loads(line) for line in files.train.read_text(encoding="utf-8").splitlines()[:count]]
    processor = embedder.processor
    return processor([Item(r["query"]) for r in rows]), processor([Item(r["positive"]) for r in rows])


def make_steps(model: EmbeddingModel, chunk_tokens: int) -> dict[str, Callable[[EncoderBatch, EncoderBatch], Tensor]]:
    loss = InfoNCE()

    def compute_loss(query: Embeddings, document: Embeddings) -> Tensor:
        rows = RowInfo.distinct(query.values.size(0), document.values.size(0))
        return loss(query.values, document.values, rows).loss

    def cached(budget: int | str) -> GradCache:
        return GradCache(model, compute_loss, chunk_tokens=chunk_tokens, activation_budget=budget)

    return {
        "plain": lambda query, document: compute_loss(model(query), model(document)),
        "all kept": cached("all"),
        "none kept": cached(0),
    }


def measure(step: Callable[[], None]) -> tuple[float, float]:
    """Run ``step``; return seconds, and the peak of resident memory above its start in bytes."""
    done = threading.Event()
    start = peak = resident()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return seconds, peak - start


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()

"""The cost of a step of ours against batch size and chunk size: time should grow with the batch, memory hardly.

Pairs of short texts, all of about the same length. What grows with the batch is
its embeddings, their gradients and the texts' tokens; the peak above the loaded
model holds the gradients of the weights, a chunk's graph, and these.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from measure import PeakMemory, Table, hardware, timed
from texts import add_data_arguments, read_pairs, short_pairs
from torch import Tensor

from vembed_fs2 import Embedder, GradCache
from vembed_fs2.data.example import Item
from vembed_fs2.embedding.model import Embeddings, EncoderBatch
from vembed_fs2.losses import InfoNCE


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    sizes = [n for n in (args.min << i for i in range(40)) if n <= args.max]
    pairs = short_pairs(read_pairs(args.data), sizes[-1], args.words)
    embedder = Embedder.load(args.model, device=device)
    embedder.model.train()
    memory = PeakMemory(device)
    kind = "bf16" if args.bf16 else "fp32"
    print(f"{hardware(device)}; {kind}; activation budget {args.budget}; median of {args.repeats}")
    print(f"the process before the first step: {memory.start / 2**20:,.0f} MiB\n")
    header = ["chunk tokens", "pairs", "tokens", "s", "ms per pair", "peak MiB", "embeddings MiB", "process MiB"]
    table = Table(header, [0, 7, 9, 8])
    for chunk_tokens in args.chunk_tokens:
        step = _Step(embedder, chunk_tokens, args)
        step.run(prepare(embedder, pairs[:64]))  # A warm-up.
        for size in sizes:
            table.add(measure(step, pairs[:size], memory, args.repeats))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--min", type=int, default=64, metavar="N", help="smallest batch (default: 64)")
    parser.add_argument("--max", type=int, default=1024, metavar="N", help="largest batch (default: 1024)")
    parser.add_argument("--words", type=int, default=4, metavar="N", help="words of a text (default: 4)")
    parser.add_argument("--chunk-tokens", type=int, nargs="+", default=[2048], metavar="N", help="default: 2048")
    parser.add_argument(
        "--budget", type=_budget, default=0, help="for kept graphs: 0, all, auto or a size (default: 0)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="steps of each size (default: 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    add_data_arguments(parser)
    return parser.parse_args()


def _budget(value: str) -> int | str:
    return int(value) if value.isdecimal() else value


class _Step:
    """A cached step with a chunk size."""

    def __init__(self, embedder: Embedder, chunk_tokens: int, args: argparse.Namespace) -> None:
        objective = InfoNCE()

        def compute_loss(query: Embeddings, document: Embeddings) -> Tensor:
            return objective(query.values, document.values).loss / query.values.size(0)

        self.embedder = embedder
        self.chunk_tokens = chunk_tokens
        self._cache = GradCache(embedder.model, compute_loss, chunk_tokens=chunk_tokens, activation_budget=args.budget)
        self._bf16 = args.bf16

    def run(self, batches: list[EncoderBatch]) -> None:
        with torch.autocast(self.embedder.device.type, torch.bfloat16, enabled=self._bf16):
            loss = self._cache(*batches)
        torch.autograd.backward(loss)
        self.embedder.model.zero_grad(set_to_none=True)


def prepare(embedder: Embedder, pairs: list[tuple[str, str]]) -> list[EncoderBatch]:
    batches = [embedder.processor([Item(pair[role]) for pair in pairs]) for role in (0, 1)]
    for batch in batches:
        batch.to(embedder.device)
    return batches


def measure(step: _Step, pairs: list[tuple[str, str]], memory: PeakMemory, repeats: int) -> list[str]:
    """Return a row of the table."""
    embedder = step.embedder
    batches = prepare(embedder, pairs)
    tokens = sum(sum(batch.profile().costs()) for batch in batches)
    memory.reset()
    times = [timed(embedder.device, lambda: step.run(batches))[0] for _ in range(repeats)]
    seconds = statistics.median(times)
    embeddings = 2 * len(pairs) * embedder.embedding_dim * 4
    sizes = [memory.peak(), embeddings, memory.total()]
    counts = [f"{step.chunk_tokens:,}", f"{len(pairs):,}", f"{tokens:,}"]
    return [*counts, f"{seconds:.2f}", f"{seconds / len(pairs) * 1e3:.2f}", *(f"{size / 2**20:,.0f}" for size in sizes)]


if __name__ == "__main__":
    main()

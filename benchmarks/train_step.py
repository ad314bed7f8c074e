"""The cost of one contrastive step, forward and backward: ours against sentence-transformers and GradCache.

The same weights, texts, batch, threads, type and dropout for all. Two
processes, each with the environment of one side, run single steps in turns,
and sleep while the other runs. Prints medians. The machine's rate of matrix
products is measured before each step, and is a median, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import encoder_flops, hardware, matmul_rate, print_table
from texts import add_data_arguments, read_pairs, write_pairs
from workers import Measured, Worker

PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"


@dataclass
class Results:
    """What was measured of a step."""

    times: list[float] = field(default_factory=list)
    last: Measured = field(default_factory=Measured)
    peak: int | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")


def main() -> None:
    args = parse_arguments()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        data = Path(folder) / "pairs.jsonl"
        write_pairs(data, read_pairs(args.data), args.pairs)
        settings = {**vars(args), "data": str(data), "model": str(args.model), "dropout": has_dropout(args)}
        settings = {k: v for k, v in settings.items() if k != "peers"}
        workers = [stack.enter_context(Worker(sys.executable, "ours.py", settings))]
        if args.peers.is_file():
            workers.append(stack.enter_context(Worker(args.peers, "peers.py", settings)))
        else:
            print(f"There is no {args.peers}, so only our own steps run. `make bench` creates it.")
        lengths = same_lengths(workers)
        print_heading(args, lengths, workers)
        results, rate = measure(workers, args)
    print(f"Matrix products: {rate / 1e9:,.0f} GFLOP/s\n")
    flops = encoder_flops(json.loads((args.model / "config.json").read_text()), lengths)
    print_results(results, sum(lengths), flops / rate)
    if args.check:
        check(results, 2e-2 if args.bf16 else 1e-4)
    elif args.repeats:
        print_ratios(results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=64, metavar="N", help="rows of the batch (default: 64)")
    add_data_arguments(parser)
    parser.add_argument("--max-length", type=int, metavar="N", help="longest text in tokens (default: the model's)")
    parser.add_argument("--chunk-tokens", type=int, default=2048, metavar="N", help="size of a chunk (default: 2048)")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[16], metavar="N", help="mini-batches of the peers (default: 16)"
    )
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed rounds after the first (default: 5)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--no-dropout", action="store_true", help="dropout off")
    parser.add_argument("--check", action="store_true", help="dropout off; fail if losses or gradients differ")
    parser.add_argument("--steps", nargs="+", metavar="WORD", help="only steps whose name holds one of these")
    parser.add_argument("--peers", type=Path, default=PEERS, metavar="PYTHON", help="Python of the peers' environment")
    return parser.parse_args()


def has_dropout(args: argparse.Namespace) -> bool:
    return not (args.check or args.no_dropout)


def same_lengths(workers: list[Worker]) -> list[int]:
    """Return the tokens of each text, after a check that all workers cut the texts alike."""
    first, *others = (list(w.about["lengths"]) for w in workers)
    if any(lengths != first for lengths in others):
        raise SystemExit("The workers cut the same texts into different tokens.")
    return first


def measure(workers: list[Worker], args: argparse.Namespace) -> tuple[dict[str, Results], float]:
    """Run all steps in turns: a first round for the memory, then rounds for the time.

    :returns: what was measured of each step, and the machine's rate of matrix products meanwhile, in FLOP/s.
    """
    words: list[str] | None = args.steps
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    rates = []
    steps = [
        (worker, name)
        for i in range(max(len(w.about["steps"]) for w in workers))
        for worker in workers
        for name in worker.about["steps"][i : i + 1]
        if words is None or any(word in name for word in words)
    ]
    results = {name: Results() for _, name in steps}
    for round_nr in range(args.repeats + 1):
        for worker, name in steps:
            # The rate of a machine that others use, too, changes while it is measured.
            rates.append(matmul_rate(torch.device(args.device), dtype))
            result = results[name]
            if result.last.error is not None:
                continue
            result.last = worker.run(name, memory=round_nr == 0)
            if round_nr == 0:
                result.peak = result.last.peak
            else:
                result.times.append(result.last.seconds)
    order = [name for worker in workers for name in worker.about["steps"]]
    return {name: results[name] for name in order if name in results}, statistics.median(rates)


def print_heading(args: argparse.Namespace, lengths: list[int], workers: list[Worker]) -> None:
    kind = "bf16" if args.bf16 else "fp32"
    print(f"{hardware(torch.device(args.device))}; torch {torch.__version__}")
    print("; ".join(w.about["name"] for w in workers))
    sizes = f"{len(lengths) // 2:,} pairs, {sum(lengths):,} tokens (texts of {min(lengths)} to {max(lengths)})"
    dropout = "on" if has_dropout(args) else "off"
    print(f"{sizes}, chunks of {args.chunk_tokens:,} tokens, {kind}, dropout {dropout}, median of {args.repeats}\n")


def print_results(results: dict[str, Results], tokens: int, floor: float) -> None:
    """
    :param floor: the seconds that the matrix products of one pass forward and backward take at the machine's rate.
    """
    header = ["step", "s", "tokens/s", "of products' rate", "peak MiB", "graphs kept", "loss", "gradient norm"]
    rows = []
    for name, result in results.items():
        last = result.last
        if last.error is not None:
            rows.append([name, last.error, *[""] * (len(header) - 2)])
            continue
        seconds = result.seconds
        speed = [f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{floor / seconds:.2f}"] if result.times else [""] * 3
        peak = f"{(result.peak or 0) / 2**20:,.0f}"
        kept = "" if last.kept is None else f"{last.kept:.0%}"
        rows.append([name, *speed, peak, kept, f"{last.loss:.6f}", f"{last.grad_norm:.6f}"])
    print_table(header, rows)


def print_ratios(results: dict[str, Results]) -> None:
    """Print how much longer each step takes than each of ours."""
    timed = {name: r.seconds for name, r in results.items() if r.times}
    ours = {name: seconds for name, seconds in timed.items() if name.startswith("ours")}
    rows = [[name, *(f"{seconds / own:.2f}" for own in ours.values())] for name, seconds in timed.items()]
    print()
    print_table(["time of", *(f"over {name}" for name in ours)], rows)


def check(results: dict[str, Results], tolerance: float) -> None:
    """Fail if losses or gradient norms differ between the steps."""
    for key in ("loss", "grad_norm"):
        values = {name: getattr(r.last, key) for name, r in results.items() if r.last.error is None}
        first = next(iter(values.values()))
        if not all(abs(value - first) <= tolerance * abs(first) for value in values.values()):
            raise SystemExit(f"The steps differ in {key}: {values}")
    print(f"\nAll losses and gradient norms agree to {tolerance:g}.")


if __name__ == "__main__":
    main()

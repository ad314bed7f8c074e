"""The memory and time of a contrastive loss: InfoNCE in tiles against the usual code, forward and backward.

The usual code ("naive") normalises, multiplies, and calls `cross_entropy`.
Memory is the peak above the embeddings and their gradients, each measured in a
process of its own; times are medians of alternating steps. Naive steps that
would take more than half of the free memory are not run; their need is
computed from the last size that was.

The aim, in one direction: at most 128 MiB for 32,768 rows, and 1.35 times the naive seconds for 8,192.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import PeakMemory, hardware, print_table, timed
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from vembed_fs2.losses import InfoNCE, InfoNCEConfig

MIB = 2**20
VECTORS = {"query": 16, "document": 32}

Step = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of rows [4,096 to 65,536; 64 to 512 of maxsim]")
    parser.add_argument("--dim", type=int, help="dimensions [512; 128 of maxsim]")
    parser.add_argument("--similarity", choices=["cosine", "maxsim"], default="cosine")
    parser.add_argument("--directions", choices=["one", "both"], nargs="+", default=["one", "both"])
    parser.add_argument("--device", choices=["cpu", "cuda"], nargs="+")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed; one of those above 10,000 rows")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(**json.loads(args.worker))))
        return
    is_maxsim = args.similarity == "maxsim"
    sizes = args.sizes or ([64, 128, 256, 512] if is_maxsim else [4096, 8192, 16384, 32768, 65536])
    shape = {"dim": args.dim or (128 if is_maxsim else 512), "similarity": args.similarity, "dtype": args.dtype}
    for device in args.device or ["cpu"] + ["cuda"] * torch.cuda.is_available():
        print(f"\n{hardware(torch.device(device))}; {', '.join(f'{k} {v}' for k, v in shape.items())}\n", flush=True)
        rows = []
        for directions in args.directions:
            per_pair = 12.0  # The logits, their softmax and their gradient, unless measured.
            for size in sorted(sizes):
                case = {**shape, "device": device, "directions": directions, "size": size}
                row, per_pair = compare(case, per_pair, args.repeats)
                rows.append(row)
        print_table(["directions", "rows", "naive MiB", "ours MiB", "naive s", "ours s", "ratio"], rows)


def compare(case: dict[str, Any], per_pair: float, repeats: int) -> tuple[list[str], float]:
    """Measure a size. *Returns:* the row of the table, and the naive bytes per pair of rows."""
    num_pairs = case["size"] ** 2
    need, names = per_pair * num_pairs, ["naive", "ours"]
    if need > free_memory(case["device"]) / 2:
        names.remove("naive")
    peaks = {name: run_worker(case, names=[name])["peak"] for name in names}
    if "naive" in peaks:
        need, per_pair = peaks["naive"], peaks["naive"] / num_pairs
    times = run_worker(case, names=names, repeats=repeats if case["size"] <= 10_000 else 1)["seconds"]
    ours, naive = times["ours"], times.get("naive")
    return [
        case["directions"],
        f"{case['size']:,}",
        f"{need / MIB:,.0f}" + ("" if naive else " (not run)"),
        f"{peaks['ours'] / MIB:,.0f}",
        f"{naive:.3f}" if naive else "-",
        f"{ours:.3f}",
        f"{ours / naive:.2f}" if naive else "-",
    ], per_pair


def free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run_worker(case: dict[str, Any], **more: Any) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps({**case, **more})]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return result


def work(
    *,
    size: int,
    dim: int,
    similarity: str,
    directions: str,
    device: str,
    dtype: str,
    names: list[str],
    repeats: int | None = None,
) -> dict[str, Any]:
    """Measure the memory of one step, or the seconds of several in turns if ``repeats`` is set."""
    where, steps = torch.device(device), make_steps(similarity, directions)
    leaves = make_embeddings(64, dim, similarity, dtype, where)
    for name in names:  # What libraries allocate for good.
        steps[name](*leaves).backward()
    leaves = make_embeddings(size, dim, similarity, dtype, where)
    if repeats is None:
        memory = PeakMemory(where)
        steps[names[0]](*leaves).backward()
        return {"peak": memory.peak() - sum(x.grad.nbytes for x in leaves if x.grad is not None)}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses = {}
    for _ in range(repeats):
        for name in names:
            for x in leaves:
                x.grad = None
            took, losses[name] = timed(where, lambda step=steps[name]: one_step(step, leaves))
            seconds[name].append(took)
    if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
        raise SystemExit(f"The losses differ: {losses}.")
    return {"seconds": {name: statistics.median(values) for name, values in seconds.items()}}


def one_step(step: Step, leaves: list[Tensor]) -> float:
    loss = step(*leaves)
    loss.backward()
    return float(loss.detach())


def make_embeddings(size: int, dim: int, similarity: str, dtype: str, device: torch.device) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(0)
    leaves = []
    for width in VECTORS.values():
        shape = (size, width, dim) if similarity == "maxsim" else (size, dim)
        leaves.append(torch.randn(shape, generator=g, device=device, dtype=getattr(torch, dtype)).requires_grad_())
    return leaves


def make_steps(similarity: str, directions: str) -> dict[str, Step]:
    both = directions == "both"
    names = ["query_to_document", "document_to_query"][: 1 + both]
    loss = InfoNCE(InfoNCEConfig(similarity=similarity, directions=names))  # type: ignore[arg-type]

    def naive(query: Tensor, document: Tensor) -> Tensor:
        q, d = normalize(query, dim=-1), normalize(document, dim=-1)
        if similarity == "maxsim":
            logits = torch.einsum("qld,nkd->qnlk", q, d).amax(3).sum(2).float() * 20
        else:
            logits = (q @ d.T).float() * 20
        target = torch.arange(query.size(0), device=query.device)
        value = cross_entropy(logits, target, reduction="sum")
        return (value + cross_entropy(logits.T, target, reduction="sum")) / 2 if both else value

    return {"naive": naive, "ours": lambda query, document: loss(query, document).loss}


if __name__ == "__main__":
    main()

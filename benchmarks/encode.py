"""Inference: rows per second of ours, of transformers' modules and of sentence-transformers.

all-MiniLM-L6-v2 encodes texts, from strings to vectors. CLIP B/32, SigLIP B/16
and DINOv2 S/14 encode pixels and token ids; they have random weights, of the
real sizes. The same weights, inputs and threads for all. Two processes, one
per environment, run single passes in turns, and sleep while the other runs.
Prints medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measure import Table, hardware
from texts import add_data_arguments, read_pairs
from workers import Worker

PEERS = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"


@dataclass(frozen=True)
class ImageModel:
    """A model that encodes pixels, and token ids if it has a text tower."""

    kind: str
    """The name of its classes in transformers."""

    image_size: int = 224
    text_length: int = 0
    vocab_size: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


MODELS = {
    "minilm": None,
    "clip": ImageModel("CLIP", text_length=77, vocab_size=49_408),
    "siglip": ImageModel("Siglip", text_length=64, vocab_size=32_000),
    "dinov2": ImageModel("Dinov2", options={"hidden_size": 384, "num_attention_heads": 6}),
}


@dataclass
class Results:
    """What was measured of a step."""

    values: Any = None
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times) if self.times else float("nan")


def main() -> None:
    args = parse_arguments()
    if not args.peers.is_file():
        print(f"There is no {args.peers}, so only our own side runs. `make bench` creates it.")
    print(f"{hardware(torch.device(args.device))}; torch {torch.__version__}; median of {args.repeats}")
    table = None
    for name in args.models:
        with TemporaryDirectory() as folder, ExitStack() as stack:
            settings = prepare(name, args, Path(folder))
            workers = [stack.enter_context(Worker(sys.executable, "encode_ours.py", settings))]
            if args.peers.is_file():
                workers.append(stack.enter_context(Worker(args.peers, "encode_peers.py", settings)))
            if table is None:
                print("; ".join(w.about["name"] for w in workers) + "\n")
                header = ["step", "rows/s", "of peers' fp32", "of peers' type", "cosine to fp32", "cosine to peers"]
                table = Table(header, [52])
            results = measure(workers, args.repeats, Path(folder))
        add_rows(table, name, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    add_data_arguments(parser)
    parser.add_argument("--texts", type=int, default=512, metavar="N", help="strings for MiniLM (default: 512)")
    parser.add_argument("--images", type=int, default=32, metavar="N", help="images and rows of ids (default: 32)")
    parser.add_argument("--image-rows", type=int, default=16, metavar="N", help="images in a batch (default: 16)")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[8, 32], metavar="N", help="texts in the peers' batches (default: 8 32)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed rounds after the first (default: 5)")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="layers of models with random weights, to try the script"
    )
    parser.add_argument("--no-bf16", action="store_true", help="float32 only, for processors that are slow in bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", type=Path, default=PEERS, metavar="PYTHON", help="Python of the peers' environment")
    return parser.parse_args()


def prepare(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write inputs and weights; return what workers have to know."""
    settings = {k: getattr(args, k) for k in ("device", "images", "image_rows", "rows", "no_bf16")}
    model = MODELS[name]
    if model is None:
        rows = read_pairs(args.data)
        texts = [text for row in rows for text in (row["query"], row["positive"])][: args.texts]
        folder.joinpath("texts.json").write_text(json.dumps(texts), encoding="utf-8")
        return {**settings, "folder": str(args.model), "texts": str(folder / "texts.json")}
    write_model(model, folder / "model", args.layers)
    sizes = {k: getattr(model, k) for k in ("image_size", "text_length", "vocab_size")}
    return {**settings, **sizes, "folder": str(folder / "model"), "texts": None}


def write_model(model: ImageModel, folder: Path, layers: int | None) -> None:
    import transformers

    options = dict(model.options)
    if layers is not None:
        options["num_hidden_layers"] = layers
    if model.text_length:
        options = {f"{tower}_config": options for tower in ("text", "vision")}
    if model.kind == "Dinov2":
        options["image_size"] = model.image_size
    torch.manual_seed(0)
    config = getattr(transformers, f"{model.kind}Config")(**options)
    getattr(transformers, f"{model.kind}Model")(config).save_pretrained(folder)


def measure(workers: list[Worker], repeats: int, folder: Path) -> dict[str, Results]:
    """Run all steps in turns: a first round for the embeddings, then rounds for the time."""
    steps = [
        (worker, name)
        for i in range(max(len(w.about["steps"]) for w in workers))
        for worker in workers
        for name in worker.about["steps"][i : i + 1]
    ]
    results = {name: Results() for _, name in steps}
    file = folder / "embeddings.npy"
    for worker, name in steps:
        worker.ask({"step": name, "file": str(file)})
        results[name].values = np.load(file)
    for _ in range(repeats):
        for worker, name in steps:
            results[name].times.append(worker.ask({"step": name, "file": None})["seconds"])
    return dict(sorted(results.items(), key=lambda item: (item[0].partition(": ")[0], "ours" not in item[0])))


def add_rows(table: Table, model: str, results: Mapping[str, Results]) -> None:
    for name, result in results.items():
        inputs, _, side = name.partition(": ")
        same_inputs = {k.partition(": ")[2]: r for k, r in results.items() if k.startswith(f"{inputs}: ")}
        peers = {k: r for k, r in same_inputs.items() if not k.startswith("ours")}
        kind = "bf16" if "bf16" in side else "fp32"
        plain = same_inputs[side.rpartition(", ")[0] + ", fp32"]
        others = [r for k, r in peers.items() if k.endswith("fp32")]
        cells = [f"{model} {name}", f"{len(result.values) / result.seconds:,.1f}"]
        for number_type in ("fp32", kind):
            times = [r.seconds for k, r in peers.items() if k.endswith(number_type)]
            cells.append(f"{min(times) / result.seconds:.2f}" if times else "")
        cells.append(f"{lowest_cosine(result, plain):.6f}")
        cells.append(f"{lowest_cosine(result, others[0]):.6f}" if others else "")
        table.add(cells)


def lowest_cosine(a: Results, b: Results) -> float:
    """The lowest cosine of the rows of two results, whose vectors are of unit length."""
    return float((a.values * b.values).sum(1).min())


if __name__ == "__main__":
    main()

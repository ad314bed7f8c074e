"""What each objective makes of a small model in a few steps.

The student has the first two layers of all-MiniLM-L6-v2; the teacher, where an
objective learns from one, has all six. Each objective trains the same student
on the same pairs of the text demo by `fairseq2 vembed train`; its validation
metrics are those of the demo, before and after. Where scores are needed, they are the
teacher's, for the positive and for one other document.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Table, hardware
from safetensors.torch import load_file, save_file
from texts import add_model_argument

from vembed_fs2 import Embedder
from vembed_fs2.demo.text import write_pairs
from vembed_fs2.evaluation.datasets import task_from_folder
from vembed_fs2.evaluation.retrieval import evaluate_embedder

_LAYERS = 2


@dataclass(frozen=True)
class Case:
    """An objective, and what it learns from."""

    loss: dict[str, Any]
    scores: bool = False
    teacher: bool = False


def _loss(name: str, **config: Any) -> dict[str, Any]:
    return {"name": name, "config": config}


CASES = {
    "infonce": Case(_loss("infonce")),
    "infonce, four directions": Case(
        _loss(
            "infonce",
            directions=["query_to_document", "document_to_query", "query_to_query", "document_to_document"],
            partition="joint",
        )
    ),
    "infonce, hardest 16": Case(_loss("infonce", hardest=16)),
    "infonce, filtered by the teacher": Case(_loss("infonce", false_negatives="filter_by_teacher"), teacher=True),
    "sigmoid": Case(_loss("sigmoid")),
    "triplet, hardest": Case(_loss("triplet")),
    "triplet, semi-hard": Case(_loss("triplet", mining="semi_hard")),
    "triplet, all": Case(_loss("triplet", mining="all")),
    "multi_positive": Case(_loss("multi_positive", symmetric=True)),
    "cosent": Case(_loss("cosent"), scores=True),
    "angle": Case(_loss("angle"), scores=True),
    "distillation of scores": Case(_loss("distillation"), scores=True),
    "distillation of margins": Case(_loss("distillation", kind="margin_mse"), scores=True),
    "distillation of a teacher": Case(_loss("distillation", source="teacher"), teacher=True),
    "embedding_distillation": Case(_loss("embedding_distillation"), teacher=True),
    "matryoshka of infonce": Case(_loss("matryoshka", dims=[384, 128, 32], loss={"name": "infonce"})),
    "combined: infonce, spread": Case(
        _loss("combined", losses=[{"name": "infonce"}, {"name": "spread", "weight": 0.1}])
    ),
}


def main() -> None:
    args = parse_arguments()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = args.data or folder / "data"
        if args.data is None:
            write_pairs(data)
        num_rows = args.steps * args.batch_size
        rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:num_rows]]
        student = folder / "student"
        write_student(args.model, student)
        _write_rows(folder / "pairs.jsonl", rows)
        names = args.only or list(CASES)
        if any(CASES[name].scores for name in names):
            _write_rows(folder / "scored.jsonl", with_scores(rows, args))
        task = task_from_folder(data)

        def evaluate(model: Path) -> list[float]:
            metrics = evaluate_embedder(Embedder.load(model, max_length=args.max_length), task)
            return [metrics[key] for key in ("recall@1", "recall@10", "mrr")]

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(f"{hardware(device)}; {args.steps} steps of {args.batch_size} pairs, {args.processes} processes\n")
        table = Table(["objective", "Recall@1", "Recall@10", "MRR"], [max(map(len, names))])
        table.add(["before", *_numbers(evaluate(student))])
        for name in names:
            out = folder / name.replace(" ", "-")
            train(out, CASES[name], student, folder, args)
            table.add([name, *_numbers(evaluate(out))])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="default: 20")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="of all processes (default: 64)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="with DDP (default: 1)")
    parser.add_argument("--max-length", type=int, default=128, metavar="N", help="longest text (default: 128)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="train.jsonl, queries, corpus and qrels")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the training's settings"
    )
    add_model_argument(parser)
    return parser.parse_args()


def write_student(teacher: Path, out: Path) -> None:
    """Copy the folder of a BERT, with its first layers only."""
    shutil.copytree(teacher, out)
    config = json.loads((out / "config.json").read_text())
    dropped = [f"encoder.layer.{i}." for i in range(_LAYERS, config["num_hidden_layers"])]
    config["num_hidden_layers"] = _LAYERS
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not any(layer in name for layer in dropped)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})


def with_scores(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Give each row the document of the next as a negative, and the teacher's scores of both."""
    teacher = Embedder.load(args.model, max_length=args.max_length)
    query, positive = (
        torch.as_tensor(teacher.encode([r[key] for r in rows], normalize_embeddings=True))
        for key in ("query", "positive")
    )
    negative = positive.roll(-1, 0)
    scores = torch.stack([(query * positive).sum(1), (query * negative).sum(1)], 1).tolist()
    others = [*rows[1:], rows[0]]
    return [{**row, "negatives": [o["positive"]], "scores": s} for row, o, s in zip(rows, others, scores)]


def train(out: Path, case: Case, student: Path, folder: Path, args: argparse.Namespace) -> None:
    config = out.with_suffix(".json")
    config.write_text(json.dumps({"loss": case.loss}))  # JSON is YAML.
    data = folder / ("scored.jsonl" if case.scores else "pairs.jsonl")
    values = [f"model.path={student}", f"dataset.paths=[{data}]", f"processor.max_length={args.max_length}"]
    values += [f"dataset.batch_size={args.batch_size // args.processes}", f"regime.num_steps={args.steps}"]
    values += [f"teacher.path={args.model}"] if case.teacher else []
    command = ["train", str(out), "--config-file", str(config), "--config", "optimizer.config.lr=3e-4", *values]
    command += args.config
    if args.processes > 1:
        command[2:2] = ["--nproc-per-node", str(args.processes)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "vembed_fs2", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-4000:]}\nThe training with {case.loss} ended with status {done.returncode}.")


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _numbers(values: list[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


if __name__ == "__main__":
    main()

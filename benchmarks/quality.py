"""Quality and time of fine-tuning: `fairseq2 vembed train` against the trainer of sentence-transformers.

The text demo's pairs, settings and evaluation. Both sides have the same pairs,
batch size, steps, learning rate at each step, weight decay, gradient clipping,
longest text and type; one evaluation searches with both models. Seconds of
training are those of the loop; of the process, also imports, loading and saving.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Table, hardware
from ruamel.yaml import YAML
from texts import add_model_argument
from train_step import PEERS

from vembed_fs2.demo.text import write_pairs
from vembed_fs2.evaluation.datasets import task_from_folder
from vembed_fs2.evaluation.retrieval import evaluate_embedder
from vembed_fs2.evaluation.task import RetrievalTask
from vembed_fs2.recipes.evaluate.evaluate import load_embedder
from vembed_fs2.recipes.evaluate.settings import EvaluateSettings
from vembed_fs2.recipes.optim import WarmupDecayConfig, schedule


@dataclass
class Run:
    """One fine-tuning."""

    system: str
    process_seconds: float
    train_seconds: float
    metrics: dict[str, float]


def main() -> None:
    args = parse_arguments()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = args.data or folder / "data"
        if args.data is None:
            write_pairs(data)
        task = task_from_folder(data)
        print(f"{hardware(device())}; torch {torch.__version__}; {args.model}")
        if not args.peers.is_file():
            print(f"There is no {args.peers}, so only our own training runs. `make bench` creates it.")
        print()
        header = ["system", "seed", "Recall@1", "Recall@10", "MRR", "training s", "of ours", "process s", "of ours"]
        table = Table(header, [44, 4])
        runs = []
        for seed in args.seeds:
            ours, config = train_ours(folder / f"ours-{seed}", data, seed, task, args)
            of_seed = [ours]
            table.add(row_of([ours], [ours], f"{seed}"))
            for rows in args.peer_rows if args.peers.is_file() else []:
                of_seed.append(train_peer(folder / f"peer-{seed}-{rows}", rows, config, seed, task, args))
                table.add(row_of(of_seed[-1:], [ours], f"{seed}"))
            runs.append(of_seed)
        for of_system in zip(*runs):
            table.add(row_of(of_system, [of_seed[0] for of_seed in runs], "mean"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4], metavar="N", help="default: 2 3 4")
    parser.add_argument("--pairs", type=int, metavar="N", help="train on the first N pairs only")
    parser.add_argument(
        "--peer-rows",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="mini-batches of the peer's cached loss; 0 for its plain loss, which is faster (default: 0)",
    )
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the settings of both sides"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="train.jsonl, queries, corpus and qrels")
    parser.add_argument("--peers", type=Path, default=PEERS, metavar="PYTHON", help="Python of the peers' environment")
    add_model_argument(parser)
    return parser.parse_args()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_ours(
    out: Path, data: Path, seed: int, task: RetrievalTask, args: argparse.Namespace
) -> tuple[Run, dict[str, Any]]:
    """Train; return what came of it, and the whole configuration."""
    values = [f"model.path={args.model}", f"dataset.paths=[{data / 'train.jsonl'}]", f"common.seed={seed}"]
    if args.pairs is not None:
        values.append(f"dataset.max_rows={args.pairs}")
    command = ["-m", "vembed_fs2", "train", str(out), "--preset", "demo_text", "--config", *values, *args.config]
    seconds = run_quietly([sys.executable, *command])
    config = YAML(typ="safe", pure=True).load((out / "config.yaml").read_text())
    last = json.loads((out / "metrics" / "train.jsonl").read_text().splitlines()[-1])
    return Run("ours", seconds, last["Wall Time"], evaluate(out, task, config)), config


def train_peer(
    out: Path, rows: int, config: dict[str, Any], seed: int, task: RetrievalTask, args: argparse.Namespace
) -> Run:
    """
    :param rows: mini-batches of the cached loss; 0 for the plain one.
    :param config: the configuration of our run.
    """
    out.mkdir()
    script = Path(__file__).with_name("peers_train.py")
    settings = {**peer_settings(config), "out": str(out), "model": str(args.model), "seed": seed, "cached": rows}
    seconds = run_quietly([str(args.peers), "-W", "ignore", str(script), json.dumps(settings)])
    about = json.loads((out / "training.json").read_text())
    name = f"{about['name']}, " + (f"cached, {rows} rows" if rows else "plain")
    return Run(name, seconds, about["seconds"], evaluate(out / "model", task, config))


def peer_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What the other side must be told to do the same."""
    dataset, loss, optimizer = config["dataset"], config["loss"]["config"], config["optimizer"]["config"]
    (data,) = dataset["paths"]
    num_rows = len(Path(data).read_text(encoding="utf-8").splitlines()[: dataset["max_rows"]])
    num_steps = num_rows // dataset["batch_size"]
    factor = schedule(WarmupDecayConfig(**config["lr_scheduler"]["config"]), num_steps)
    return {
        "data": data,
        "max_rows": dataset["max_rows"],
        "batch_size": dataset["batch_size"],
        "max_length": dataset["max_length"] or config["processor"]["max_length"],
        **{key: loss[key] for key in ("temperature", "directions", "partition")},
        "lr_factors": [factor(step) for step in range(num_steps)],
        "max_grad_norm": config["trainer"]["max_grad_norm"],
        "bf16": is_bf16(config),
        "device": device().type,
        **{key: optimizer[key] for key in ("lr", "betas", "eps", "weight_decay")},
    }


def is_bf16(config: dict[str, Any]) -> bool:
    return bool(config["trainer"]["mixed_precision"]["mode"] != "off")


def run_quietly(command: list[str]) -> float:
    """Run a command; return its seconds. What it printed is shown if it fails."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout[-4000:]}\n{' '.join(command)} ended with status {done.returncode}.")
    return time.perf_counter() - began


def evaluate(model: Path, task: RetrievalTask, config: dict[str, Any]) -> dict[str, float]:
    max_length = config["processor"]["max_length"]
    embedder = load_embedder(str(model), EvaluateSettings(max_length=max_length, bf16=is_bf16(config)))
    return evaluate_embedder(embedder, task)


def row_of(runs: Sequence[Run], ours: Sequence[Run], seed: str) -> list[str]:
    """A row of the table: the means over the runs of a system; times also as multiples of ours."""
    row = [runs[0].system, seed]
    row += [f"{statistics.fmean(r.metrics[key] for r in runs):.4f}" for key in ("recall@1", "recall@10", "mrr")]
    for key in ("train_seconds", "process_seconds"):
        own, base = (statistics.fmean(getattr(r, key) for r in side) for side in (runs, ours))
        row += [f"{own:.1f}", f"{own / base:.2f}"]
    return row


if __name__ == "__main__":
    main()

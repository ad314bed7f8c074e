"""Training with frozen layers, on compressed rows of several positives, and with a held-out task."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.integration.command_line import assert_same_weights, run, run_all, steps
from vembed_fs2.inference.embedder import Embedder

BASE = ["dataset.batch_size=8", "trainer.mixed_precision.mode=off", "optimizer.config.lr=0.01"]

CONSTANT = ["lr_scheduler.config.decay=constant", "lr_scheduler.config.warmup_steps=0"]
"""A schedule that does not depend on the number of steps."""


@pytest.mark.parametrize(("num_processes", "parallelism"), [(1, "ddp"), (2, "fsdp")])
def test_frozen_layers_keep_their_values(
    bert_folder: Path, texts: Path, tmp_path: Path, num_processes: int, parallelism: str
) -> None:
    run_dir = tmp_path / "run"
    command = [
        "train", run_dir, "--no-rich", "--config", f"model.path={bert_folder}", f"dataset.paths=[{texts}]", *BASE,
        "freeze.layers=1", 'freeze.params=["encoder.layers.1.self_attn[.]"]', f"trainer.data_parallelism={parallelism}",
    ]  # fmt: skip
    result = run(*command, "regime.num_steps=2", num_processes=num_processes).expect(0)

    before = dict(Embedder.load(bert_folder).model.named_parameters())
    after = dict(Embedder.load(run_dir).model.named_parameters())
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    fixed = {
        name for name in before if name.startswith(("frontend.", "encoder.layers.0.", "encoder.layers.1.self_attn."))
    }
    # The pooler is not used. A bias of the keys has no gradient.
    assert same - fixed <= {"pooler.weight", "pooler.bias"}
    assert fixed <= same

    trained, total = (sum(p.numel() for n, p in before.items() if keep(n)) for keep in (
        lambda n: n not in same, lambda n: True,
    ))  # fmt: skip
    assert f"{total:,} parameters, {trained:,} trained" in result.output

    if num_processes == 1:
        changed = run(*command, "freeze.layers=0", "regime.num_steps=3").expect(2)
        assert "other values in freeze.layers" in changed.output
        run(*command, "regime.num_steps=3").expect(0)
        assert steps(run_dir) == [2, 3]


def test_mistakes_are_said_before_anything_is_written(bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    wrong = {
        "`layers` must be at most 2, which the model has, but is 3 instead.": ["freeze.layers=3"],
        "`params`: 'layers' matches no parameter; the first one is 'front": ["freeze.params=[layers]"],
        "all parameters are frozen: nothing is left to train": ["freeze.params=[frontend,encoder]"],
        "`queries`, `corpus` and `qrels` must be specified together.": ["valid.queries=x.jsonl"],
        "`valid.max_rows`: only for files of rows": [f"valid.paths=[{task(tmp_path / 'beir')}]", "valid.max_rows=3"],
        "no-such.tsv does not exist": [f"valid.paths=[{tmp_path / 'beir'}]", "valid.split=no-such"],
        "`dataset.quoting` must be one of": ["dataset.quoting=auto"],
    }  # fmt: skip
    out = tmp_path / "out"
    base = ["train", str(out), "--no-rich", "--config", f"model.path={bert_folder}", f"dataset.paths=[{texts}]", *BASE]
    results = run_all([[*base, *config] for config in wrong.values()])
    assert [m for m, r in zip(wrong, results) if m not in r.output or r.status == 0] == []
    assert not out.exists()


def task(folder: Path) -> Path:
    """A folder in the layout of BEIR, of the words that the model knows; the first query finds itself if it may."""
    folder.mkdir()
    texts = ["red hat", "blue hat", "green shoe", "red shoe", "blue car"]
    rows = "".join(json.dumps({"_id": f"{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    folder.joinpath("queries.jsonl").write_text(rows)
    folder.joinpath("corpus.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    folder.joinpath("qrels").mkdir()
    folder.joinpath("qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t3\t1\n1\t4\t2\n2\t3\t1\n2\t9\t1\n")
    return folder


def test_a_held_out_task_is_measured_as_evaluate_does(bert_folder: Path, tmp_path: Path, texts: Path) -> None:
    beir = task(tmp_path / "beir")
    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}

    # FlagEmbedding's rows, compressed, by a pattern in the home folder.
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    pairs = [{"query": r["query"], "pos": [r["positive"], r["query"]], "neg": []} for r in rows[:20]]
    data = "".join(json.dumps(row) + "\n" for row in pairs)
    tmp_path.joinpath("rows-0.jsonl.gz").write_bytes(gzip.compress(data.encode()))

    def train(name: str, num_steps: int, *more: str) -> Path:
        folder = tmp_path / name
        run(
            "train", folder, "--no-rich", "--config", f"model.path={bert_folder}", "dataset.paths=[~/rows-*.jsonl.gz]",
            *BASE, f"regime.num_steps={num_steps}", "regime.score_metric=ndcg@10", "regime.keep_best_n_checkpoints=1",
            *CONSTANT, *(f"regime.{what}_every_n_steps=5" for what in ("validate", "checkpoint", "publish_metrics")),
            *more, **variables,
        ).expect(0)  # fmt: skip
        return folder

    # 40 examples are 5 steps of an epoch: the run is resumed at the start of the second.
    folder = train("run", 5, "valid.paths=[~/beir]")
    validated = [json.loads(line) for line in (folder / "metrics/valid.jsonl").read_text().splitlines()]
    score = float((folder / "checkpoints/scores/step_5.txt").read_text())

    report = tmp_path / "results.json"
    run("evaluate", folder, beir, "--output", report, **variables).expect(0)
    measured = json.loads(report.read_text())["metrics"]
    assert score == pytest.approx(measured["ndcg@10"], abs=1e-6)
    assert validated[-1]["MRR"] == pytest.approx(measured["mrr"], abs=1e-6)

    files = [f"valid.{name}={beir / file}" for name, file in
             (("queries", "queries.jsonl"), ("corpus", "corpus.jsonl.gz"), ("qrels", "qrels/test.tsv"))]  # fmt: skip
    whole = train("whole", 7, *files)
    train("run", 7, *files)
    assert_same_weights(folder, whole)


def test_data_check_and_evaluate_without_quoting(bert_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text('query\tpositive\nred\t"red hat\nblue\tblue hat"\n')

    result = run("data", "check", file).expect(0)
    assert "1, usable 1" in result.output
    assert f"{file}:2: a quoted field holds a tab or a line break" in result.output

    result = run("data", "check", file, "--quoting", "none").expect(0)
    assert "2, usable 2" in result.output
    assert "quoted field" not in result.output

    assert "1 queries" in run("evaluate", bert_folder, file).expect(0).output
    assert "2 queries" in run("evaluate", bert_folder, file, "--quoting", "none").expect(0).output

    with tmp_path.joinpath("index.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["", "query", "positive"], [0, "red", "red hat"]])
    assert "columns (index 1)" in run("data", "check", tmp_path / "index.csv").expect(0).output


def test_ties_of_evaluate(bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "beir"
    folder.mkdir()
    folder.joinpath("queries.jsonl").write_text('{"_id": "q", "text": "red"}\n')
    folder.joinpath("corpus.jsonl").write_text("".join(f'{{"_id": "d{i}", "text": "red hat"}}\n' for i in (1, 10, 2)))
    folder.joinpath("qrels.tsv").write_text("q\td2\t1\n")

    def mrr(*arguments: str) -> float:
        report = tmp_path / "results.json"
        run("evaluate", bert_folder, folder, "--output", report, *arguments).expect(0)
        content = json.loads(report.read_text())
        assert content.get("ties") == ("trec_eval" if "trec_eval" in arguments else None)
        return float(content["metrics"]["mrr"])

    assert mrr() == pytest.approx(1 / 3)
    assert mrr("--ties", "trec_eval") == 1
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "red", "positive": "red hat"}\n')
    result = run("evaluate", bert_folder, rows, "--ties", "trec_eval").expect(2)
    assert "`ties` needs the ids of documents" in result.output

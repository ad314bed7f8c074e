"""The benchmarks run, and what they measure is what they say; no test looks at times."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from tests.integration.command_line import run_script
from tests.integration.conftest import WORDS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

PEERS = BENCHMARKS.parent / ".venv-peers" / "bin" / "python"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script, as it imports the others."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def retrieval_data(texts: Path, tmp_path: Path) -> Path:
    """A folder with rows to train on, and held-out queries."""
    lines = texts.read_text().splitlines()
    rows = [json.loads(line) for line in lines[40:60]]
    tmp_path.joinpath("train.jsonl").write_text("\n".join(lines[:40]) + "\n")
    for name, key in (("queries", "query"), ("corpus", "positive")):
        items = [json.dumps({"_id": f"{i}", "text": row[key]}) + "\n" for i, row in enumerate(rows)]
        tmp_path.joinpath(f"{name}.jsonl").write_text("".join(items))
    qrels = "".join(f"{i}\t{i}\t1\n" for i in range(len(rows)))
    tmp_path.joinpath("qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return tmp_path


def run(script: str, *arguments: object) -> tuple[int, str]:
    done = run_script(BENCHMARKS / script, *arguments)
    return done.status, done.output


def table(output: str) -> dict[str, dict[str, str]]:
    """The first table: for each row's first cell, the others by column."""
    lines = output[output.index("| ") :].split("\n\n")[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|")
    return {row[0]: dict(zip(header[1:], row[1:])) for row in rows}


def test_train_step_compares_the_same_work(bert_folder: Path, texts: Path) -> None:
    options = ["--model", bert_folder, "--data", texts, "--pairs", 12, "--chunk-tokens", 24, "--rows", 4]
    # The tests' own environment has sentence-transformers as well, an older one.
    status, output = run("train_step.py", *options, "--check", "--repeats", 1, "--peers", sys.executable)
    assert status == 0, output
    assert "All losses and gradient norms agree to 0.0001." in output
    steps = table(output)
    ours = ["plain", "nothing kept", "half kept", "all kept"]
    assert list(steps)[:6] == [
        *(f"ours, {kind}" for kind in ours),
        "sentence-transformers, plain",
        "sentence-transformers, cached, 4 rows",
    ]
    kept = [int(steps[f"ours, {kind}"]["graphs kept"].rstrip("%")) for kind in ours[1:]]
    assert kept[0] < kept[1] < kept[2] == 100
    assert all(float(step["s"]) > 0 and int(step["peak MiB"]) >= 0 for step in steps.values())


@pytest.mark.slow
def test_train_step_runs_without_peers_and_with_dropout(bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    options = ["--model", bert_folder, "--data", texts, "--pairs", 4, "--repeats", 1, "--bf16", "--steps", "plain"]
    status, output = run("train_step.py", *options, "--peers", tmp_path / "python")
    assert status == 0, output
    assert list(table(output)) == ["ours, plain"]
    assert "dropout on" in output
    assert "bf16" in output


def test_train_step_fails_where_steps_differ(benchmark: Any) -> None:
    train_step = benchmark("train_step")
    same, other = (benchmark("workers").Measured(loss=x, grad_norm=2.0) for x in (1.0, 1.001))
    failed = benchmark("workers").Measured(error="out of memory")
    results = {name: train_step.Results(last=last) for name, last in (("a", same), ("b", same), ("c", failed))}
    train_step.check(results, 1e-4)
    with pytest.raises(SystemExit, match="differ in loss"):
        train_step.check({**results, "d": train_step.Results(last=other)}, 1e-4)
    nothing = benchmark("workers").Measured()
    with pytest.raises(SystemExit, match="differ in loss"):
        train_step.check({**results, "d": train_step.Results(last=nothing)}, 1e-4)


def test_bfloat16_compares_the_same_embeddings(bert_folder: Path, texts: Path) -> None:
    options = ["--models", "minilm", "dinov2", "--model", bert_folder, "--data", texts, "--layers", 1]
    status, output = run("bfloat16.py", *options, "--texts", 6, "--rows", 4, "--images", 1, "--repeats", 1)
    assert status == 0, output
    steps = table(output)
    assert list(steps) == ["minilm texts", "dinov2 images"]
    for step in steps.values():
        assert float(step["cosine"]) > 0.99
        assert float(step["their cosine"]) > 0.99
        assert float(step["ours / theirs"]) > 0


def test_scaling_runs(bert_folder: Path, texts: Path) -> None:
    options = ["--model", bert_folder, "--data", texts, "--min", 8, "--max", 16, "--words", 2, "--repeats", 1]
    status, output = run("scaling.py", *options, "--chunk-tokens", 32, 64)
    assert status == 0, output
    rows = re.findall(r"^\| +(32|64) +\| +(8|16) \|", output, re.MULTILINE)
    assert rows == [("32", "8"), ("32", "16"), ("64", "8"), ("64", "16")]


def quality(bert_folder: Path, data: Path, peers: Path) -> dict[str, dict[str, str]]:
    options = ["--model", bert_folder, "--data", data, "--seeds", 1, "--pairs", 24, "--peer-rows", 0, 4]
    changes = ["--config", "processor.max_length=32", "dataset.batch_size=8"]
    status, output = run("quality.py", *options, "--peers", peers, *changes)
    assert status == 0, output
    return table(output)


def test_quality_trains_and_evaluates(bert_folder: Path, retrieval_data: Path, tmp_path: Path) -> None:
    rows = quality(bert_folder, retrieval_data, tmp_path / "python")
    assert list(rows) == ["ours"]
    assert 0.0 <= float(rows["ours"]["Recall@10"]) <= 1.0
    assert float(rows["ours"]["training s"]) > 0.0


@pytest.mark.skipif(not PEERS.is_file(), reason="`make bench` creates the environment of the peers")
def test_quality_trains_the_peer_alike(bert_folder: Path, retrieval_data: Path) -> None:
    rows = quality(bert_folder, retrieval_data, PEERS)
    assert [name.partition(", ")[2] for name in rows] == ["", "plain", "cached, 4 rows"]


def test_quality_gives_the_peer_our_settings(benchmark: Any, retrieval_data: Path) -> None:
    from vembed_fs2.recipes.optim import WarmupDecayConfig, schedule

    config = {
        "dataset": {"paths": [str(retrieval_data / "train.jsonl")], "max_rows": 30, "batch_size": 4, "max_length": 12},
        "processor": {"max_length": 16},
        "loss": {"config": {"temperature": 0.1, "directions": ["query_to_document"], "partition": "joint"}},
        "optimizer": {"config": {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-7, "weight_decay": 0.1, "groups": []}},
        "lr_scheduler": {"config": {"decay": "linear", "warmup_ratio": 0.3, "final_lr_scale": 0.1}},
        "trainer": {"max_grad_norm": 2.0, "mixed_precision": {"mode": "off"}},
    }
    settings = benchmark("quality").peer_settings(config)
    factor = schedule(WarmupDecayConfig(decay="linear", warmup_ratio=0.3, final_lr_scale=0.1), 7)
    assert settings["lr_factors"] == [factor(step) for step in range(7)]
    del settings["lr_factors"], settings["data"], settings["device"]
    assert settings == {
        "max_rows": 30,
        "batch_size": 4,
        "max_length": 12,
        "temperature": 0.1,
        "directions": ["query_to_document"],
        "partition": "joint",
        "max_grad_norm": 2.0,
        "bf16": False,
        "lr": 1e-3,
        "betas": [0.9, 0.99],
        "eps": 1e-7,
        "weight_decay": 0.1,
    }


@pytest.mark.slow
def test_objectives_run(bert_folder: Path, retrieval_data: Path) -> None:
    options = ["--model", bert_folder, "--data", retrieval_data, "--steps", 1, "--batch-size", 4, "--max-length", 32]
    status, output = run("objectives.py", *options, "--only", "distillation of scores")
    assert status == 0, output
    assert list(table(output)) == ["before", "distillation of scores"]


def test_objectives_are_all_there_is(benchmark: Any) -> None:
    from vembed_fs2.losses import LOSSES
    from vembed_fs2.recipes.components import Components
    from vembed_fs2.recipes.layers import structure
    from vembed_fs2.recipes.train.config import TrainConfig
    from vembed_fs2.recipes.train.recipe import create_recipe

    components = Components(create_recipe())
    cases = benchmark("objectives").CASES
    for name, case in cases.items():
        config = structure(TrainConfig, {"loss": case.loss}, components.find_config)
        components.resolve(config)
        assert not config.loss.validate().has_error(), name
    assert set(re.findall(r"'name': '(\w+)'", str([case.loss for case in cases.values()]))) == set(LOSSES)


def test_objectives_student_is_the_front_of_the_teacher(
    benchmark: Any, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = benchmark("objectives")
    monkeypatch.setattr(objectives, "_LAYERS", 1)
    objectives.write_student(bert_folder, tmp_path / "student")
    teacher, student = (BertModel.from_pretrained(folder) for folder in (bert_folder, tmp_path / "student"))
    assert len(student.encoder.layer) == 1
    kept = teacher.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in student.state_dict().items())


def test_loss_memory_runs() -> None:
    status, output = run(
        "loss_memory.py", "--sizes", 64, "--dim", 16, "--directions", "one", "--repeats", 1, "--device", "cpu"
    )
    assert status == 0, output


def test_flops_are_those_that_torch_counts(benchmark: Any) -> None:
    config = BertConfig(vocab_size=11, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
    model = BertModel._from_config(config, attn_implementation="eager", add_pooling_layer=False)
    with FlopCounterMode(display=False) as counter:
        for length in (5, 9):
            model(torch.ones(1, length, dtype=torch.int64)).last_hidden_state.sum().backward()
    assert benchmark("measure").encoder_flops(config.to_dict(), [5, 9]) == counter.get_total_flops()


def test_peak_memory_is_that_since_the_reset(benchmark: Any) -> None:
    memory = benchmark("measure").PeakMemory(torch.device("cpu"))
    size = 64 * 2**20
    torch.ones(size, dtype=torch.uint8)
    # The kernel counts in batches of pages.
    assert size * 0.9 <= memory.peak() < size * 1.5
    memory.reset()
    assert memory.peak() < size / 2


def test_short_pairs_are_different_and_short(benchmark: Any) -> None:
    texts = benchmark("texts")
    rows = [{"query": "", "positive": " ".join(f"{WORDS[i]} {j}" for i in range(6) for j in (1, 2))}] * 2
    pairs = texts.short_pairs(rows, 2, 3)
    assert len(set(pairs)) == 2
    assert all(len(text.split()) == 3 for pair in pairs for text in pair)
    with pytest.raises(SystemExit, match="only"):
        texts.short_pairs(rows, 5, 3)

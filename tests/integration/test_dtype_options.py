"""``evaluate --dtype`` and ``export --dtype``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from safetensors.torch import load_file

from vembed_fs2 import Embedder, dtypes
from vembed_fs2.commands import evaluate, export
from vembed_fs2.recipes.evaluate.config import EvaluateConfig


def run(command: ModuleType, *arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(a) for a in arguments])) == 0


def report(file: Path, *arguments: object) -> dict[str, Any]:
    run(evaluate, *arguments, "--device", "cpu", "--output", file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_evaluation_loads_and_reports_the_type(bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    loaded, own_load = [], Embedder.load

    def load(*args: Any, **kwargs: Any) -> Embedder:
        loaded.append(own_load(*args, **kwargs))
        return loaded[-1]

    with (
        patch("vembed_fs2.recipes.evaluate.evaluate.Embedder.load", load),
        patch.object(dtypes, "has_bfloat16_products", lambda: True),
    ):
        reports = [
            report(tmp_path / "results.json", bert_folder, texts, *options)
            for options in ([], ["--dtype", "bfloat16"], ["--dtype", "auto"], ["--bf16"])
        ]

    assert [str(e.dtype) for e in loaded] == [f"torch.{r['dtype']}" for r in reports]
    assert [r["dtype"] for r in reports] == ["float32", "bfloat16", "bfloat16", "float32"]
    assert [e.autocast_dtype is not None for e in loaded] == [r["bf16"] for r in reports] == [False, False, False, True]
    assert reports[1]["metrics"] == reports[2]["metrics"]
    assert reports[1]["metrics"]["ndcg@10"] == pytest.approx(reports[0]["metrics"]["ndcg@10"], abs=0.05)


def test_wrong_types_are_refused(bert_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--dtype", "bf16"], "invalid choice: 'bf16'"),
        (["--dtype", "bfloat16", "--bf16"], "--bf16: not allowed with argument --dtype"),
    ):
        with pytest.raises(SystemExit):
            run(evaluate, bert_folder, texts, *options)
        assert message in capsys.readouterr().err

    errors = [str(error) for error in EvaluateConfig(model="x", dtype="bf16").validate().errors]
    assert errors == [
        "`dtype` must be one of auto, float32, bfloat16, float16, float64, but is 'bf16'. Did you mean 'bfloat16'?"
    ]


def test_export_writes_and_says_the_type(bert_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, dtype in (([], "float32"), (["--dtype", "bfloat16"], "bfloat16")):
        out = tmp_path / dtype
        run(export, bert_folder, out, "--format", "hf", *options)
        assert f"Written to {out}, in {dtype}." in capsys.readouterr().out
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype
        assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {f"torch.{dtype}"}

    half = (tmp_path / "bfloat16" / "model.safetensors").stat().st_size
    assert half < 0.6 * (tmp_path / "float32" / "model.safetensors").stat().st_size

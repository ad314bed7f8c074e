"""``fairseq2 vembed evaluate``, in one process and on gangs; and the recipe that it runs there."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command_line import FAIRSEQ2, Result, environment, run
from tests.integration.command_line import run_forked as run_command


@pytest.fixture(scope="module")
def alone(bert_folder: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What one process prints and writes."""
    file = tmp_path_factory.mktemp("alone") / "results.json"
    result = run("evaluate", bert_folder, texts, "--output", file).expect(0)
    return result.output, json.loads(file.read_text())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands put their temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def table(output: str) -> list[str]:
    """The lines of the table, without what libraries print before and after it."""
    lines = output.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("80 queries, 83 documents")]
    (last,) = [i for i, line in enumerate(lines) if "num_queries_without_relevant" in line]
    return lines[first : last + 1]


def test_the_launcher_shows_what_one_process_does(
    bert_folder: Path, texts: Path, tmp_path: Path, temporary: Path, alone: tuple[str, dict[str, Any]]
) -> None:
    file = tmp_path / "results.json"
    arguments = [str(bert_folder), str(texts), "--output", str(file), "--nproc-per-node", "2", "--device", "cpu"]
    result = run(*arguments, program=[FAIRSEQ2, "vembed", "evaluate"]).expect(0)

    assert json.loads(file.read_text()) == alone[1]
    assert table(result.output) == table(alone[0])
    assert "INFO" not in result.output
    assert list(temporary.iterdir()) == []


def test_a_baseline_is_compared_on_a_gang(bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    """Processes that torchrun has started; the first one prints."""
    outputs = {}
    for count in (1, 3):
        file = tmp_path / f"{count}.json"
        command = ["vembed", "evaluate", str(bert_folder), str(texts), "--baseline", f"{bert_folder}/../bert"]
        result = run_command([*command, "--output", str(file), "--ks", "2", "7"], num_processes=count).expect(0)
        outputs[count] = (json.loads(file.read_text()), table(result.output))

    assert outputs[3] == outputs[1]
    assert {"recall@2", "recall@7", "mrr"} <= outputs[3][0]["baseline_metrics"].keys()


def test_the_recipe_writes_a_folder(
    bert_folder: Path, texts: Path, tmp_path: Path, alone: tuple[str, dict[str, Any]]
) -> None:
    folder = tmp_path / "evaluation"
    result = run_recipe(
        str(folder), "--no-rich", "--config", f"model={bert_folder}", f"data.paths=[{texts}]", num_processes=2
    ).expect(0)

    assert json.loads(folder.joinpath("results.json").read_text()) == alone[1]
    assert {"config.yaml", "logs", "results.json"} <= {path.name for path in folder.iterdir()}
    assert "ndcg@10" in result.output
    assert "Config: " in folder.joinpath("logs/rank_1.log").read_text()


def test_mistakes_on_a_gang_are_said_once(bert_folder: Path, texts: Path, tmp_path: Path, temporary: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    rows = [{"query": "red", "positive": {"image": "no.png"}}, {"query": "blue", "positive": "green"}]
    broken.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = {
        "data": ([str(bert_folder), str(broken)], "broken.jsonl"),
        "device": ([str(bert_folder), str(texts), "--device", "cuda:1"], "--device must be cpu or cuda on several"),
    }
    for name, (arguments, text) in cases.items():
        result = run("evaluate", *arguments, "--nproc-per-node", "2").expect(2)

        errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, f"{name}: {result.output}"
        assert text in result.output, f"{name}: {result.output}"
    assert list(temporary.glob("vembed_evaluate_*")) == []


def run_recipe(*arguments: str, num_processes: int) -> Result:
    from tests.forks import free_port, gang_environment, run_forks

    port = free_port()
    environments = [environment(**gang_environment(rank, num_processes, port)) for rank in range(num_processes)]
    return run_forks(be_recipe, list(arguments), environments=environments)


def be_recipe(arguments: list[str]) -> None:
    import sys

    from vembed_fs2.recipes.launch import main

    sys.argv = ["evaluate", *arguments]
    main("vembed_fs2.recipes.evaluate")

"""Datasets: opening, checking, leaving out; and the report of ``data check``."""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vembed_fs2.commands import data_check as check
from vembed_fs2.commands.data_check import check_dataset, render
from vembed_fs2.data import dataset
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.example import Example
from vembed_fs2.errors import ConfigError, DataError


def write(file: Path, rows: list[object]) -> Path:
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return file


def pairs(count: int) -> list[object]:
    return [{"query": f"q{i}", "positive": f"p{i}"} for i in range(count)]


def test_examples_by_index(tmp_path: Path) -> None:
    data = ExampleDataset(write(tmp_path / "x.jsonl", pairs(5)), max_rows=3)
    assert [e.query.text for e in (data[0], data[2], data[-1])] == ["q0", "q2", "q2"]
    assert data[1].source == f"{tmp_path}/x.jsonl:2"
    assert len(data) == 3
    for index in (3, -4):
        with pytest.raises(IndexError):
            data[index]


def test_all_problems_are_found_at_opening(tmp_path: Path) -> None:
    rows = pairs(30)
    for i in range(0, 24, 2):
        rows[i] = {"query": "", "positive": "p"}
    with pytest.raises(DataError) as info:
        ExampleDataset(write(tmp_path / "x.jsonl", rows))
    message = str(info.value)
    assert message.startswith("12 of 30 rows cannot be used:\n  - ")
    assert "x.jsonl:1: 'query' is an empty text." in message
    assert "- and 2 more" in message


def test_unchecked_rows_are_errors_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CHECKED_ROWS", 1)
    file = write(tmp_path / "x.jsonl", [*pairs(2), "{"])
    data = ExampleDataset(file)
    assert data[1].query.text == "q1"
    with pytest.raises(DataError, match=r"x\.jsonl:3: not valid JSON"):
        data[2]
    with pytest.raises(DataError, match="1 of 3 rows"):
        ExampleDataset(file, check=True)


def test_skipped_rows_shift_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = pairs(8)
    rows[2], rows[3], rows[6] = {"query": "", "positive": "p2"}, "[", {"query": "q6"}
    with caplog.at_level(logging.WARNING, "vembed_fs2"):
        data = ExampleDataset(write(tmp_path / "x.jsonl", rows), on_error="skip")

    assert [(e.query.text, e.positive and e.positive.text) for e in (data[i] for i in range(len(data)))] == [
        (f"q{i}", f"p{i}") for i in (0, 1, 4, 5, 7)
    ]
    assert data.num_skipped == 3
    assert len(caplog.records) == 1
    assert "3 of 8 rows cannot be used" in caplog.text
    assert "x.jsonl:4: not valid JSON" in caplog.text


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="The dataset is empty: 1 of 1 rows"):
        ExampleDataset(write(tmp_path / "x.jsonl", [{"query": "q"}]), on_error="skip")


def test_bad_options(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", pairs(1))
    with pytest.raises(ConfigError, match="`on_error` must be 'raise' or 'skip', but is 'ignore'"):
        ExampleDataset(file, on_error="ignore")
    with pytest.raises(ConfigError, match="`max_rows` must be positive"):
        ExampleDataset(file, max_rows=0)


def test_report(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_text("no image")
    file = write(
        tmp_path / "x.jsonl",
        [
            {"query": "q", "positive": "p", "negatives": ["n", "nn"], "id": 1},
            {"query": "q", "positive": "p", "score": 1},
            {"query": "qqq", "positive": "p", "label": 1},
            {"query_image": "a.png", "label": 1},
            {"query": "q2", "positive_image": "a.png", "label": 2},
            {"query": "q2", "positive_image": "broken.png"},
            {"query": "q2", "positive_image": "missing.png"},
        ],
    )
    report = check_dataset(file)

    assert (report.num_rows, report.num_usable, report.ok) == (7, 5, False)
    assert dict(report.modes) == {"t2t": 3, "i with a label only": 1, "t2i": 1}
    assert sorted(report.lengths["query"].values) == [1, 1, 2, 3]
    assert str(report.lengths["query"]) == "min 1, median 1, p95 3, max 3"
    assert (report.num_images, list(report.widths.values), list(report.heights.values)) == (2, [40, 40], [30, 30])
    assert report.num_negatives == {0: 4, 2: 1}
    assert report.labels == {"1": 2, "2": 1}
    assert (report.queries.count, report.documents.count, report.pairs.count, report.num_scored) == (1, 2, 1, 1)
    assert report.ignored_columns == {"id"}
    assert report.problems.first == [
        f"{file}:6: {tmp_path}/broken.png is not an image, or of a format that is not supported.",
        f"{file}:7: 'positive_image' is missing.png, but there is no file {tmp_path}/missing.png.",
    ]
    assert "2 problems:\n  - " in render(report)
    assert check_dataset(file, images="none").problems.count == 1


def test_truncated_and_huge_images_are_problems(tmp_path: Path) -> None:
    """Their headers are sound: only a training, or this, finds out."""
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    tmp_path.joinpath("1.png").write_bytes(tmp_path.joinpath("0.png").read_bytes()[:60])
    Image.new("1", (11_000, 10_000)).save(tmp_path / "2.png")
    file = write(tmp_path / "x.jsonl", [{"query": "q", "positive_image": f"{i % 3}.png"} for i in range(300)])

    report = check_dataset(file, images="all")

    assert (report.num_usable, report.problems.count, len(report.widths.values)) == (100, 200, 100)
    assert report.problems.first[:2] == [
        f"{file}:2: {tmp_path}/1.png is truncated or broken: image file is truncated.",
        f"{file}:3: {tmp_path}/2.png has 11000 x 10000 pixels, more than the limit of 100000000.",
    ]


def test_report_shows_the_first_problems_and_counts_all(tmp_path: Path) -> None:
    report = check_dataset(write(tmp_path / "x.jsonl", [*pairs(2), *[{"query": ""}] * 30]))
    assert (report.problems.count, len(report.problems.first)) == (30, 20)
    assert "30 problems" in render(report)
    assert "- and 10 more" in render(report)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    file = str(write(tmp_path / "x.jsonl", [{"title": "q", "positive": "p", "label": 1.5}]))

    assert check.run(parser.parse_args([file, "--column", "query=title"])) == 1
    assert "x.jsonl:1: 'label' must be" in capsys.readouterr().out
    args = [file, "--column", "query=title", "--column", "label=", "--mode", "t2t"]
    assert check.run(parser.parse_args(args)) == 0
    assert "No problems found." in capsys.readouterr().out
    with pytest.raises(ConfigError, match="must be FIELD=NAME, but is 'query'"):
        check.run(parser.parse_args([file, "--column", "query"]))


def test_the_guide_is_right(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    blocks = re.findall(r"```(bash|python)\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "check").write_text(
        f"""#!{sys.executable}
import argparse, sys
from vembed_fs2.commands import data_check as check
parser = argparse.ArgumentParser()
check.add_arguments(parser)
sys.exit(check.run(parser.parse_args()))
"""
    )
    (tmp_path / "check").chmod(0o755)
    outputs = []
    for language, code in blocks:
        command = [sys.executable, "-c", code]
        if language == "bash":
            command = ["bash", "-ec", code.replace("fairseq2 vembed data check", "./check")]
        outputs.append(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)

    assert [output.splitlines()[-1] for output in outputs] == [
        "No problems found.",
        "No problems found.",
        "No problems found.",
        "No problems found.",
        "No problems found.",  # Labels.
        "has problems",
        "2 who wrote Faust? pairs.jsonl:1",
    ]


@pytest.mark.parametrize("check", [None, False])
def test_rows_of_no_use_to_the_caller_are_left_out_or_an_error(tmp_path: Path, check: bool | None) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"query": f"q{i}", "positive": "p"}) + "\n" for i in range(4)))

    def accept(example: Example) -> None:
        if example.query.text in ("q1", "q2"):
            raise DataError(f"{example.source}: not this one")

    if check is None:
        with pytest.raises(DataError, match=r"2 of 4 rows cannot be used:\n  - .*x\.jsonl:2: not this one"):
            ExampleDataset(file, accept=accept)
        left = ExampleDataset(file, accept=accept, on_error="skip")
        assert ([e.query.text for e in left], left.num_skipped) == (["q0", "q3"], 2)
    else:
        late = ExampleDataset(file, accept=accept, check=check)
        assert late[3].query.text == "q3"
        with pytest.raises(DataError, match=r"x\.jsonl:3: not this one"):
            late[2]


def test_the_command_prints_help_without_heavy_imports() -> None:
    heavy = "{'torch', 'fairseq2', 'pyarrow', 'numpy'}"
    code = f"import sys, vembed_fs2.commands.data_check; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"

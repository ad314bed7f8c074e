"""Rows with several positives, and FlagEmbedding's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from vembed_fs2.commands.data_check import check_dataset, render
from vembed_fs2.data import dataset as dataset_module
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.errors import DataError
from vembed_fs2.evaluation.datasets import task_from_examples

from .test_sources import FORMATS, write

FLAG = [
    {"query": "a", "pos": ["p1", "p2"], "neg": ["n1", "n2"], "pos_scores": [0.9, 0.8], "neg_scores": [0.1, 0.2]},
    {"query": "b", "pos": ["p3"], "neg": ["n3"], "pos_scores": [0.7], "neg_scores": [0.3]},
    {"query": "c", "pos": ["p4", "p1", "p5"], "neg": [], "pos_scores": [1, 2, 3], "neg_scores": []},
]


def summary(dataset: ExampleDataset) -> list[tuple[Any, ...]]:
    return [
        (e.query.text, e.positive.text, [n.text for n in e.negatives], e.scores)
        for e in dataset
        if e.positive is not None
    ]


EXPECTED = [
    ("a", "p1", ["n1", "n2"], (0.9, 0.1, 0.2)),
    ("a", "p2", ["n1", "n2"], (0.8, 0.1, 0.2)),
    ("b", "p3", ["n3"], (0.7, 0.3)),
    ("c", "p4", [], (1.0,)),
    ("c", "p1", [], (2.0,)),
    ("c", "p5", [], (3.0,)),
]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("suffix", FORMATS)
def test_each_positive_is_an_example_in_every_format(tmp_path: Path, suffix: str, check: bool) -> None:
    dataset = ExampleDataset(write(tmp_path / f"x.{suffix}", FLAG), check=check)
    assert len(dataset) == 6
    assert summary(dataset) == EXPECTED
    assert dataset[-1] == dataset[5]
    assert [e.source for e in dataset][:2] == [dataset[0].source] * 2


@pytest.mark.parametrize("check", [True, False])
def test_only_the_first_rows_of_the_file_count(tmp_path: Path, check: bool) -> None:
    dataset = ExampleDataset(write(tmp_path / "x.jsonl", FLAG), check=check, max_rows=2)
    assert summary(dataset) == EXPECTED[:3]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_lists_in_two_columns(tmp_path: Path, suffix: str) -> None:
    two = ["a", "b"]
    rows = [{"query": "q", "pos": None, "positives": two}, {"query": "r", "pos": two, "positives": None}] * 2
    for max_rows in (1, 3):
        dataset = ExampleDataset(write(tmp_path / f"x.{suffix}", rows), check=False, max_rows=max_rows)
        assert [e.positive.text for e in dataset if e.positive is not None] == two * max_rows


def test_a_row_that_cannot_be_used_takes_all_its_positives_with_it(tmp_path: Path) -> None:
    broken = {"query": "x", "pos": ["p", ""]}
    file = write(tmp_path / "x.jsonl", [*FLAG[:1], broken, *FLAG[1:]])
    with pytest.raises(DataError, match=r"1 of 4 rows cannot be used:\n  - .*x.jsonl:2: 'pos\[1\]' is an empty text"):
        ExampleDataset(file)
    assert summary(ExampleDataset(file, on_error="skip")) == EXPECTED

    late = ExampleDataset(file, check=False)
    assert len(late) == 8
    with pytest.raises(DataError, match=r"x.jsonl:2"):
        late[3]
    assert late[4].query.text == "b"


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("first", [FLAG[0], FLAG[1]])
def test_a_list_whose_key_is_written_with_escapes(tmp_path: Path, first: dict[str, Any], check: bool) -> None:
    # Python and other programs write ASCII keys as they are; the search for lists need not know others.
    file = tmp_path / "x.jsonl"
    file.write_text(
        json.dumps(first) + "\n" + '{"query": "q", "\\u0070os": ["a", "b"]}\n' + '{"query": "r", "pos": "s"}\n'
    )
    dataset = ExampleDataset(file, check=check)
    if check:
        assert [e.positive.text for e in dataset if e.positive is not None][-3:] == ["a", "b", "s"]
    else:
        with pytest.raises(DataError, match=r"x.jsonl:2: the list of positives was not found when the file was opened"):
            dataset[len(first["pos"])]
        assert dataset[len(first["pos"]) + 1].query.text == "r"


@pytest.mark.parametrize("check", [True, False])
def test_lists_in_mapped_columns(tmp_path: Path, check: bool) -> None:
    file = write(tmp_path / "x.jsonl", [{"q": "a", "gute Ä": ["p1", "p2"]}, {"q": "b", "gute Ä": ["p3"]}])
    file.write_text(file.read_text("utf-8") + '{"q": "c", "gute \\u00c4": ["p4", "p5"]}\n', "utf-8")
    dataset = ExampleDataset(file, columns={"query": "q", "positive": "gute Ä"}, check=check)
    assert [e.positive.text for e in dataset if e.positive is not None] == ["p1", "p2", "p3", "p4", "p5"]


def test_positives_may_be_texts_images_or_both(tmp_path: Path) -> None:
    PILImage.new("RGB", (2, 2)).save(tmp_path / "a.png")
    positives = ["text", {"image": "a.png"}, {"text": "t", "image": "a.png"}, [{"text": "x"}, {"image": "a.png"}, "y"]]
    dataset = ExampleDataset(write(tmp_path / "x.jsonl", [{"query": "q", "positives": positives}]))
    kinds = [e.positive.describe_order() for e in dataset if e.positive is not None]
    assert kinds == ["text", "image", "image, text", "text, image, text"]
    assert check_dataset(tmp_path / "x.jsonl", images="all").num_images == 3


PAIR = {"query": "q", "positive": "p"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "positives": ["a"]}, "'positives' must not be given together with 'positive'"),
        ({"query": "q", "positives": ["a", None]}, "'positives' has nothing as entry 2"),
        ({"query": "q", "positives": ["a", 5]}, r"'positives\[1\]' must be a text, but is 5"),
        ({"query": "q", "pos": ["a", "b"], "positive_image": "x.png"}, "'positive_image' must not be given when 'pos'"),
        ({"query": "q", "pos": ["a", "b"], "scores": [1]}, "'scores' scores one positive, but the row has 2: give"),
        ({**PAIR, "scores": [1], "pos_scores": [1]}, "'pos_scores' must not be given together with 'scores'"),
        ({**PAIR, "pos_scores": [1, 2]}, "'pos_scores' must have 1 entries, one for each positive, but has 2"),
        (
            {**PAIR, "neg": ["n"], "pos_scores": [1], "neg_scores": [1, 2]},
            "'neg_scores' must have 1 entries, one for each",
        ),
        ({"query": "q", "label": 1, "pos_scores": [1]}, "'pos_scores' must have 0 entries"),
        ({"query": "q", "label": 1, "scores": [1]}, "'scores' scores the positive, but the row has none"),
    ],
)
def test_broken_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ExampleDataset(write(tmp_path / "x.jsonl", [row]))


@pytest.mark.parametrize(
    "scores", [{"pos_scores": [1]}, {"negative_scores": [0.5]}, {"pos_scores": [], "neg_scores": None}]
)
def test_scores_of_one_kind_alone_are_no_scores(tmp_path: Path, scores: dict[str, Any]) -> None:
    file = write(
        tmp_path / "x.jsonl", [{**PAIR, "neg": ["n"], **scores}, {**PAIR, "neg": ["n"], "scores": [2, 1], **scores}]
    )
    assert [example.scores for example in ExampleDataset(file)] == [(), (2, 1)]


def test_the_prompt_of_flag_embedding_is_the_instruction(tmp_path: Path) -> None:
    def instruction(row: dict[str, Any], **options: Any) -> str | None:
        return ExampleDataset(write(tmp_path / "x.jsonl", [row]), **options)[0].query.instruction

    row = {"query": "q", "pos": ["p"], "neg": ["n"], "prompt": "Find it."}
    assert instruction(row) == "Find it."
    assert instruction({**row, "prompt": ""}) is None
    assert instruction({**row, "instruction": "No."}) == "No."
    assert instruction(row, columns={"instruction": None}) is None
    # In other files a column of that name is none of ours.
    assert instruction({**PAIR, "prompt": "Find it."}) is None


def test_a_text_of_a_csv_file_that_only_looks_like_a_list_is_a_text(tmp_path: Path) -> None:
    values = ["[1] Smith, 2004", '["open', '["a", 5]', "[]", '[{"a": 1}]']
    dataset = ExampleDataset(write(tmp_path / "x.csv", [{"query": "q", "positive": value} for value in values]))
    assert [e.positive.text for e in dataset if e.positive is not None] == values


def test_evaluation_counts_all_positives(tmp_path: Path) -> None:
    task = task_from_examples(list(ExampleDataset(write(tmp_path / "x.jsonl", FLAG))))
    texts = [item.text for item in task.corpus]
    assert len(task.queries) == 3
    assert [sorted(texts[d] or "" for d in relevant) for relevant in task.relevant] == [
        ["p1", "p2"],
        ["p3"],
        ["p1", "p4", "p5"],
    ]


def test_data_check_says_how_many_there_are(tmp_path: Path) -> None:
    report = check_dataset(write(tmp_path / "x.jsonl", FLAG))
    text = render(report)
    assert "rows:           3, usable 3" in text
    assert "rows with:      1 positives: 1" in text
    assert "rows with:      3 positives: 1" in text
    assert "to train on:    6, one for each positive" in text
    assert "repeated:       queries 0, documents 1, pairs 0" in text


def test_large_files_are_searched_for_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "CHECKED_ROWS", 2)
    rows = [{"query": f"q{i}", "pos": [f"p{i}"] * (2 if i == 40 else 1), "note": '"pos": ["'} for i in range(50)]
    dataset = ExampleDataset(write(tmp_path / "x.jsonl", rows))
    assert len(dataset) == 51
    assert [dataset[i].query.text for i in (39, 40, 41, 42)] == ["q39", "q40", "q40", "q41"]


def test_an_image_of_nulls_is_a_missing_value(tmp_path: Path) -> None:
    none = {"bytes": None, "path": None}
    PILImage.new("RGB", (2, 2)).save(tmp_path / "a.png")
    real = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    rows = [
        {"query": "a", "positive": "p", "query_image": none, "neg_image_1": none, "neg_1": "n", "neg_image_2": none},
        {"query": None, "positive": "p", "query_image": real, "neg_image_1": real, "neg_1": None, "neg_image_2": none},
    ]
    file = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    first, second = ExampleDataset(file)
    assert (first.query.images, [len(n.images) for n in first.negatives]) == ((), [0])
    assert (second.query.text, len(second.query.images), [len(n.images) for n in second.negatives]) == (None, 1, [1])

    lists = [
        {"query": [{"text": "x", "image": none}, {"text": None, "image": real}], "negatives": ["n", "m"],
         "positive": {"text": "p", "image": none}, "negative_images": [none, real]},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(lists), file)
    example = ExampleDataset(file)[0]
    assert example.query.describe_order() == "text, image"
    assert [n.describe_order() for n in example.negatives] == ["text", "image, text"]

    pq.write_table(pa.Table.from_pylist([{"query": "q", "positive": None, "positive_image": none}]), file)
    with pytest.raises(DataError, match="'positive' is empty, and there is no image and no label either"):
        ExampleDataset(file)

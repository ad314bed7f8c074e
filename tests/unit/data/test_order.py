"""Batches that hold a few rows of each label."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.example import Example, Item
from vembed_fs2.data.order import order_by_label
from vembed_fs2.data.reader import EmbeddingDataReader
from vembed_fs2.data.schema import label_id
from vembed_fs2.errors import ConfigError, DataError

Batches = list[list[int]]


def order(labels: list[int], count: int = 4, batch: int = 16, seed: int = 0, epoch: int = 0) -> list[int]:
    return order_by_label(np.array(labels), count, batch, seed=seed, epoch=epoch).tolist()


def cut(rows: list[int], size: int) -> Batches:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=90), st.integers(2, 6), st.integers(6, 40), st.integers(0, 9))
def test_every_row_is_used_once(labels: list[int], count: int, batch: int, epoch: int) -> None:
    assert sorted(order(labels, count, batch, epoch=epoch)) == list(range(len(labels)))


def test_classes_of_equal_size_have_k_rows_each_in_batches_of_k_times_p() -> None:
    labels = [c for c in range(1, 25) for _ in range(12)]
    for batch in cut(order(labels), 16):
        assert set(Counter(labels[row] for row in batch).values()) <= {4, 8}
    per_batch = [len({labels[row] for row in batch}) for batch in cut(order(labels), 16)]
    assert np.mean(per_batch) > 3.9  # Of four: a class is seldom in a batch twice.


@pytest.mark.parametrize(("count", "batch"), [(4, 64), (5, 50), (2, 32), (3, 17)])
def test_hardly_any_row_is_without_its_like(count: int, batch: int) -> None:
    """With classes of all sizes, as in Stanford Online Products (2 to 12 images of a product)."""
    draw = np.random.default_rng(0)
    labels = [c + 1 for c, size in enumerate(draw.integers(2, 13, 700)) for _ in range(size)]
    draw.shuffle(labels)
    alone = 0
    for rows in cut(order(labels, count, batch), batch):
        alone += sum(n == 1 for n in Counter(labels[row] for row in rows).values())
    assert alone / len(labels) < 0.01


def test_rare_classes_are_groups_of_their_own_size_and_no_group_is_a_single_row() -> None:
    labels = [1] * 100 + [2] * 2 + [3] * 3 + [4] * 5 + [5] * 1
    sizes: dict[int, list[int]] = {}
    rows = order(labels, 4, 1000)
    for before, row in zip([None, *rows], rows):
        if before is None or labels[before] != labels[row]:
            sizes.setdefault(labels[row], []).append(0)
        sizes[labels[row]][-1] += 1
    assert (sizes[2], sizes[3], sizes[5]) == ([2], [3], [1])
    assert sizes[4] == [5]  # Not 4 and 1.
    assert sum(sizes[1]) == 100


def test_frequent_classes_are_spread_over_the_epoch() -> None:
    labels = [1] * 400 + [c for c in range(2, 102) for _ in range(4)]
    counts = [Counter(labels[row] for row in rows)[1] for rows in cut(order(labels, 4, 40), 40)]
    assert min(counts) >= 12
    assert max(counts) <= 28  # Half of each batch, in expectation.


def test_the_order_depends_on_seed_and_epoch_and_never_changes() -> None:
    labels = [1, 2, 3] * 4
    assert order(labels, 2, 6) == [2, 11, 0, 9, 1, 4, 8, 5, 3, 6, 10, 7]
    assert len({tuple(order(labels, 2, 6, seed=s, epoch=e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_rows_without_a_label_are_drawn_by_themselves() -> None:
    labels = [0] * 40 + [1] * 40
    rows = order(labels, 4, 80)
    runs = [len(list(run)) for run in np.split(np.array(rows), np.flatnonzero(np.diff([labels[r] for r in rows])) + 1)]
    assert len(runs) > 10


def examples(labels: list[int]) -> list[Example]:
    return [Example(Item(str(i)), label=str(label)) for i, label in enumerate(labels)]


def reader(classes: list[int], **options: Any) -> EmbeddingDataReader[list[int]]:
    def numbers(rows: list[Example]) -> list[int]:
        return [int(row.query.text or "") for row in rows]

    values: dict[str, Any] = {"batch_size": 16, "seed": 3, "labels": np.array(classes), "rows_per_label": 4, **options}
    return EmbeddingDataReader(examples(classes), numbers, **values)


LABELS = [1 + i * i % 11 for i in range(203)]


def steps(data: EmbeddingDataReader[list[int]], count: int) -> list[list[list[int]]]:
    out = []
    while len(out) < count:
        try:
            out.append(next(data))
        except StopIteration:
            data.reset()
    return out


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_batches_of_one_process(world_size: int, drop_last: bool) -> None:
    single = steps(reader(LABELS, drop_last=drop_last), 30)
    size = 16 // world_size
    parts = [
        steps(reader(LABELS, batch_size=size, rank=r, world_size=world_size, drop_last=drop_last), 30)
        for r in range(world_size)
    ]
    joined = [[[row for (rows,) in step for row in rows]] for step in zip(*parts)]
    assert joined == single


def test_a_reader_goes_on_where_its_state_was_taken() -> None:
    whole = steps(reader(LABELS), 30)
    first = reader(LABELS)
    begun = steps(first, 17)
    other = reader(LABELS, seed=8)
    other.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [*begun, *steps(other, 13)] == whole


def test_a_state_of_another_number_of_rows_per_label_is_refused() -> None:
    state = reader(LABELS).state_dict()
    with pytest.raises(DataError, match="its number of rows per label was 4, but now it is 2"):
        reader(LABELS, rows_per_label=2).load_state_dict(state)
    older = reader(LABELS, rows_per_label=0).state_dict()
    del older["rows_per_label"]
    reader(LABELS, rows_per_label=0).load_state_dict(older)
    with pytest.raises(DataError, match="its number of rows per label was 0, but now it is 4"):
        reader(LABELS).load_state_dict(older)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_label": 1}, "must be from 2 to the 16 rows of a batch, but is 1"),
        ({"rows_per_label": 17}, "must be from 2 to the 16 rows of a batch, but is 17"),
        ({"shuffle": False}, "needs `shuffle`"),
        ({"labels": None}, "needs the label of each row"),
        ({"labels": np.array([1, 2])}, "needs the label of each row"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader(LABELS, **options)


ROWS: list[dict[str, Any]] = [{"query": f"q{i}", "label": label} for i, label in enumerate(["a", 2, 2.0, None, "2"])]


def expected(labels: list[str | None]) -> list[int]:
    return [0 if label is None else label_id(label) for label in labels]


def test_labels_are_read_in_one_pass(tmp_path: Path) -> None:
    for row in ROWS:
        row["positive"] = "p"
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert ExampleDataset(file).labels().tolist() == expected(["a", "2", "2", None, "2"])
    table = tmp_path / "x.csv"
    table.write_text("query,positive,class\na,p,1\nb,p,1.0\nc,p,\nd,p,01\n")
    mapped = ExampleDataset(table, columns={"label": "class"})
    assert mapped.labels().tolist() == expected(["1", "1", None, "01"])
    assert [e.label for e in mapped] == ["1", "1", None, "01"]
    assert not ExampleDataset(table, columns={"label": None}).labels().any()
    assert ExampleDataset(table, columns={"label": "class"}, max_rows=2).labels().tolist() == expected(["1", "1"])


def test_labels_of_tables_are_read_by_column(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"query": ["a", "b", "c"], "label": pa.array([1.0, None, 2.0]), "positive": ["p"] * 3}), file
    )
    assert ExampleDataset(file).labels().tolist() == expected(["1", None, "2"])
    plain = tmp_path / "y.parquet"
    pq.write_table(pa.table({"query": ["a"], "positive": ["p"]}), plain)
    assert ExampleDataset(plain).labels().tolist() == [0]


def test_a_row_that_cannot_be_read_has_no_label_or_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    lines = ['{"query": "a", "label": 1}', "{broken", '{"query": "b", "label": 1.5}', '{"query": "c", "label": 2}']
    file.write_text("\n".join(lines) + "\n")
    kept = ExampleDataset(file, on_error="skip", check=False)
    assert kept.labels().tolist() == [label_id("1"), 0, 0, label_id("2")]
    assert ExampleDataset(file, on_error="skip").labels().tolist() == [label_id("1"), label_id("2")]
    with pytest.raises(DataError, match=r"x\.jsonl:2: not valid JSON"):
        ExampleDataset(file, check=False).labels()


def test_rows_of_one_side_are_found(tmp_path: Path) -> None:
    for name, second, found in (
        ("a", '{"query": "b", "label": 1}', True),
        ("b", '{"query": "b", "positive": "c"}', False),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text('{"query": "a", "positive": "b"}\n' + second + "\n")
        assert ExampleDataset(file).has_rows_of_one_side() == found
        assert ExampleDataset(file, check=False).has_rows_of_one_side() == found

"""Rows with a label only on their way to an objective, and what training and ``data check`` say of data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from vembed_fs2.commands.data_check import check_dataset
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.example import Example, Item, Role
from vembed_fs2.data.schema import content_id
from vembed_fs2.embedding.model import Embeddings, EncoderBatch
from vembed_fs2.errors import ConfigError, DataError
from vembed_fs2.losses import LOSSES, RowInfo, create_loss
from vembed_fs2.processing.processor import Processor
from vembed_fs2.recipes.train.config import DatasetSection
from vembed_fs2.recipes.train.dataset import Collator, ContrastiveBatch
from vembed_fs2.recipes.train.objective import Reads, check_data, check_row
from vembed_fs2.recipes.train.recipe import choose_rows_per_label
from vembed_fs2.recipes.train.sides import complete_queries

READS = {"the model": Reads(frozenset({"text", "image"}), is_interleaved=False)}


class Recording(Processor[str]):
    """A processor that remembers what it collated."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Role | None, list[str]]] = []

    def prepare(self, item: Item) -> str:
        return item.text or ""

    def collate(self, prepared: Sequence[str], *, role: Role | None = None, prompt: str | None = None) -> EncoderBatch:
        self.seen.append((role, list(prepared)))
        return EncoderBatch(len(prepared))

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def collate(rows: list[Example]) -> tuple[ContrastiveBatch, list[tuple[Role | None, list[str]]]]:
    processor = Recording()
    collator = Collator(processor)
    return collator([collator.load(row) for row in rows]), processor.seen


def alone(text: str, label: str = "l", negatives: Sequence[str] = ()) -> Example:
    return Example(Item(text), label=label, negatives=tuple(map(Item, negatives)))


def pair(text: str, negatives: Sequence[str] = ()) -> Example:
    return Example(Item(text), Item(f"+{text}"), negatives=tuple(map(Item, negatives)))


def test_rows_with_a_label_only_are_encoded_once() -> None:
    batch, seen = collate([alone("a"), alone("b", negatives=["x", "y"]), alone("c")])
    assert seen == [("document", ["a", "b", "c", "x", "y"])]
    assert batch.query is None
    assert batch.num_queries == 3
    assert batch.rows.one_sided is not None
    assert batch.rows.one_sided.tolist() == [True] * 3
    ids = [content_id(Item(text)) for text in "abcxy"]
    assert (batch.rows.query_ids.tolist(), batch.rows.document_ids.tolist()) == (ids[:3], ids)
    assert batch.rows.negative_rows is not None
    assert batch.rows.negative_rows.tolist() == [1, 1]
    batch.rows.check(3, 5)


def test_beside_pairs_they_are_encoded_once_as_well() -> None:
    batch, seen = collate([alone("a"), pair("b", ["x"]), alone("c", negatives=["y"]), pair("d")])
    assert seen == [("query", ["b", "d"]), ("document", ["a", "+b", "c", "+d", "x", "y"])]
    assert batch.rows.one_sided is not None
    assert batch.rows.one_sided.tolist() == [True, False, True, False]
    assert batch.rows.negative_rows is not None
    assert batch.rows.negative_rows.tolist() == [1, 2]


def test_pairs_are_what_they_were() -> None:
    batch, seen = collate([pair("a", ["x"]), pair("b")])
    assert seen == [("query", ["a", "b"]), ("document", ["+a", "+b", "x"])]
    assert batch.num_queries == 2


@pytest.mark.parametrize("several", [False, True])
def test_their_query_is_their_document(several: bool) -> None:
    flags = torch.tensor([True, False, True, False, False])
    shape = (3, 4, 2) if several else (3, 2)
    query, document = torch.randn(shape), torch.randn(7, *shape[1:-1], 2)[:, :3] if several else torch.randn(7, 2)
    masks: Any = (torch.rand(3, 4) < 0.5, torch.rand(7, 3) < 0.5) if several else (None, None)
    rows = RowInfo(*(torch.zeros(n, dtype=torch.int64) for n in (5, 7, 5)), one_sided=flags)
    got = complete_queries(Embeddings(query, masks[0]), Embeddings(document, masks[1]), rows)
    for row, (is_document, place) in enumerate([(1, 0), (0, 0), (1, 2), (0, 1), (0, 2)]):
        expected, mask = (document[place], masks[1]) if is_document else (query[place], masks[0])
        if not several:
            assert torch.equal(got.values[row], expected)
            continue
        assert got.mask is not None
        assert torch.equal(got.values[row][: len(expected)], expected)
        assert torch.equal(got.mask[row][: len(expected)], mask[place])
        assert not got.mask[row][len(expected) :].any()


FILES: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"query": f"q{i}", "positive": f"p{i}"} for i in range(4)],
    "pairs of a label": [{"query": f"q{i}", "positive": f"p{i}", "label": i % 2} for i in range(4)],
    "labels": [{"query": f"q{i}", "label": i % 2} for i in range(6)],
    "labels of one row each": [{"query": f"q{i}", "label": i} for i in range(4)],
    "one label": [{"query": f"q{i}", "label": 1} for i in range(4)],
    "one label with negatives": [{"query": f"q{i}", "label": 1, "negatives": ["n"]} for i in range(4)],
    "some with a label only": [{"query": "q", "positive": "p", "label": 1}, {"query": "r", "label": 2}],
    "scores": [{"query": f"q{i}", "positive": f"p{i}", "score": 0.5} for i in range(4)],
    "some scores": [{"query": "q", "positive": "p", "score": 0.5}, {"query": "q2", "positive": "p"}],
    "negatives": [{"query": f"q{i}", "positive": f"p{i}", "negatives": ["n"]} for i in range(4)],
    "scored negatives": [{"query": f"q{i}", "positive": "p", "negatives": ["n"], "scores": [1, 0]} for i in range(4)],
    "neither": [{"query": "q", "positive": "p"}, {"query": "r"}],
}


def can_train(file: Path, name: str) -> bool:
    loss = create_loss(name)
    try:
        check_data(ExampleDataset(file, accept=partial(check_row, loss=loss, readers=READS)), loss)
    except DataError:
        return False
    return True


@pytest.mark.parametrize("rows", FILES)
def test_data_check_says_what_training_says_for_every_objective(rows: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FILES[rows]))
    report = check_dataset(file)
    names = LOSSES.keys() - {"combined", "matryoshka"}
    said = {name.split(" ")[0]: not problems and report.ok for name, problems in report.objectives.items()}
    assert said == {name: can_train(file, name) for name in names}
    by_label = {"infonce", "multi_positive", "sigmoid", "spread", "triplet"}
    expected = {
        "pairs": names - {"angle", "cosent", "distillation"},
        "pairs of a label": names - {"angle", "cosent", "distillation"},
        "labels": by_label,
        "labels of one row each": set(),
        "one label": set(),
        "one label with negatives": by_label,
        "some with a label only": by_label,
        "scores": names - {"distillation"},
        "some scores": names - {"angle", "cosent", "distillation"},
        "negatives": names - {"angle", "cosent", "distillation"},
        "scored negatives": names,
        "neither": set(),
    }
    assert {name for name, able in said.items() if able} == expected[rows]


@pytest.mark.parametrize(
    ("values", "num_rows", "expected"),
    [
        ({}, 64, 4),
        ({}, 8, 2),
        ({"rows_per_label": 6}, 64, 6),
        ({"rows_per_label": 0}, 64, 0),
        ({"shuffle": False}, 64, 0),
    ],
)
def test_the_number_of_rows_per_label(
    values: dict[str, Any], num_rows: int, expected: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FILES["labels"]))
    with caplog.at_level("INFO", "vembed_fs2"):
        assert choose_rows_per_label(DatasetSection(paths=[file], **values), ExampleDataset(file), num_rows) == expected
    assert (f"about {expected} rows of a label together" in caplog.text) == (expected > 0)
    assert not expected or "2 labels, 0 of one row" in caplog.text


def test_pairs_are_drawn_as_ever_unless_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FILES["pairs of a label"]))
    assert choose_rows_per_label(DatasetSection(paths=[file]), ExampleDataset(file), 64) == 0
    assert choose_rows_per_label(DatasetSection(paths=[file], rows_per_label=3), ExampleDataset(file), 64) == 3


@pytest.mark.parametrize(
    ("values", "num_rows", "message"),
    [({}, 1, "`batch_size` is 1"), ({"rows_per_label": 8}, 4, "`rows_per_label` is 8, but a batch has 4 rows")],
)
def test_batches_that_are_too_small(values: dict[str, Any], num_rows: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in FILES["labels"]))
    with pytest.raises(ConfigError, match=message):
        choose_rows_per_label(DatasetSection(paths=[file], **values), ExampleDataset(file), num_rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows_per_label": 1}, "`rows_per_label` must be 0, or greater than or equal to 2, but is 1"),
        ({"rows_per_label": -1}, "`rows_per_label` must be 0, or greater than or equal to 2, but is -1"),
        ({"rows_per_label": 4, "shuffle": False}, "`rows_per_label` needs `shuffle`"),
    ],
)
def test_wrong_values(values: dict[str, Any], message: str) -> None:
    result = DatasetSection(paths=[Path("x.jsonl")], **values).validate()
    assert message in str(result)

"""Rows for the objective and for a teacher, and what the teacher makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from tests.distributed.steps import BERT, create_model, texts
from vembed_fs2.data.example import Example, Image, Item, Role, Text
from vembed_fs2.data.usable import DataFacts, missing_in_data
from vembed_fs2.embedding.model import EncoderBatch, HeadConfig
from vembed_fs2.errors import ConfigError, DataError
from vembed_fs2.losses import Distillation, InfoNCE, Objective
from vembed_fs2.processing.processor import Processor
from vembed_fs2.recipes.train.config import GradCacheSection
from vembed_fs2.recipes.train.dataset import Collator
from vembed_fs2.recipes.train.objective import Reads, check_row
from vembed_fs2.recipes.train.teacher import Teacher


class Recording(Processor[str]):
    """A processor that remembers what it was asked for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.seen: list[tuple[str, list[str]]] = []

    def prepare(self, item: Item) -> str:
        return item.text or f"{self.name} pixels of {item.images[0]}"

    def collate(self, prepared: Sequence[str], *, role: Role | None = None, prompt: str | None = None) -> EncoderBatch:
        self.seen.append((f"{self.name} {role}", list(prepared)))
        return EncoderBatch.of_text(torch.ones(len(prepared), 1, dtype=torch.int64))

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def row(number: int, num_negatives: int, *, scored: bool = True) -> Example:
    negatives = tuple(Item(text=f"n{number}{i}") for i in range(num_negatives))
    scores = tuple(number + i / 10 for i in range(1 + num_negatives)) if scored else ()
    return Example(Item(text=f"q{number}"), Item(text=f"p{number}"), negatives, scores=scores, source=f"f:{number}")


def test_the_objective_is_told_whose_negatives_are_whose_and_their_scores() -> None:
    processor = Recording("model")
    collator = Collator(processor)
    batch = collator([collator.load(e) for e in (row(1, 2), row(2, 0), row(3, 1, scored=False), row(4, 1))])
    assert processor.seen[1] == ("model document", ["p1", "p2", "p3", "p4", "n10", "n11", "n30", "n40"])
    rows = batch.rows
    rows.check(4, 8)
    assert rows.negative_rows is not None
    assert rows.scores is not None
    assert rows.negative_rows.tolist() == [0, 0, 2, 3]
    nan = float("nan")
    expected = torch.tensor([1.0, 2.0, nan, 4.0, 1.1, 1.2, nan, 4.1])
    torch.testing.assert_close(rows.scores, expected, equal_nan=True)
    assert batch.teacher_query is batch.teacher_document is None


def test_rows_without_scores_and_negatives_have_tensors_as_well() -> None:
    """Ranks gather them alike, whatever rows they hold."""
    processor = Recording("model")
    collator = Collator(processor)
    rows = collator([collator.load(row(1, 0, scored=False))]).rows
    assert rows.scores is not None
    assert rows.scores.isnan().tolist() == [True]
    assert rows.scores.dtype == torch.float32
    assert rows.negative_rows is not None
    assert rows.negative_rows.tolist() == []
    assert rows.negative_rows.dtype == torch.int64


def test_a_teacher_has_its_own_prompts_and_pixels() -> None:
    processor = Recording("model")
    teacher = Recording("teacher")
    collator = Collator(processor, teacher)
    example = Example(Item(text="q"), Item(images=("a.png",)), (Item(text="n"),))
    batch = collator([collator.load(example)])
    for each in (processor, teacher):
        assert each.seen == [
            (f"{each.name} query", ["q"]),
            (f"{each.name} document", [f"{each.name} pixels of a.png", "n"]),
        ]
    assert batch.teacher_query is not None
    assert batch.teacher_document is not None
    batch.to(torch.device("meta"))
    for part in (batch.query, batch.document, batch.teacher_query, batch.teacher_document):
        assert part.text is not None
        assert part.text.input_ids.device.type == "meta"
    assert batch.rows.scores is not None
    assert batch.rows.scores.device.type == "meta"


ALL = Reads(frozenset({"text", "image"}), is_interleaved=False)

TEXTS = Reads(frozenset({"text"}), is_interleaved=False)

BOTH = {"the model": ALL, "the teacher": ALL}


def test_a_row_without_scores_is_refused_where_they_are_needed() -> None:
    check_row(row(1, 1), Distillation(), BOTH)
    check_row(row(2, 1, scored=False), InfoNCE(), BOTH)
    with pytest.raises(DataError, match="f:2: the row has no `scores`"):
        check_row(row(2, 1, scored=False), Distillation(), BOTH)


def test_a_row_that_cannot_be_read_is_refused() -> None:
    picture = replace(row(3, 1), negatives=(Item(images=("a.png",)),))
    readers = {"the teacher": ALL, "the model": TEXTS}
    check_row(row(3, 1), InfoNCE(), readers)
    check_row(picture, InfoNCE(), BOTH)
    with pytest.raises(DataError, match="f:3: the row has an image, but the model reads none"):
        check_row(picture, InfoNCE(), readers)
    with pytest.raises(DataError, match="f:3: the row has a text, but the teacher reads none"):
        check_row(picture, InfoNCE(), {"the model": ALL, "the teacher": ALL._replace(modalities=frozenset({"image"}))})
    with pytest.raises(DataError, match="f:3: the row has no positive"):
        check_row(replace(picture, positive=None), InfoNCE(), BOTH)


def test_an_order_that_a_model_cannot_express_is_refused_before_anything_is_trained() -> None:
    parts = [Text("this"), Image("a.png"), Text("but red")]
    ordered = replace(row(3, 1), query=Item(parts=parts))
    joint = ALL._replace(is_interleaved=True)
    check_row(ordered, InfoNCE(), {"the model": joint})
    late = ALL._replace(is_multi_vector=True)
    mixed = replace(row(4, 1), query=Item("t", ("a.png",)), source="f:4")
    with pytest.raises(DataError, match=r"f:4: the model has several vectors per row, .* but is image, text\."):
        check_row(mixed, InfoNCE(), {"the model": late})
    with pytest.raises(DataError, match=r"f:3: the teacher encodes .* apart, .* the order text, image, text"):
        check_row(ordered, InfoNCE(), {"the model": joint, "the teacher": ALL})


def test_an_objective_that_compares_documents_needs_negatives() -> None:
    lonely: Any = [row(1, 0), row(2, 0)]
    some: Any = [row(1, 0), row(2, 1)]
    assert not problems(some, Distillation())
    assert not problems(lonely, InfoNCE())
    assert problems(lonely, Distillation()) == [
        "the objective compares the documents of each row, but no row has `negatives`"
    ]


def problems(rows: list[Example], loss: Objective) -> list[str]:
    facts = DataFacts()
    for example in rows:
        facts.add(example)
    return list(missing_in_data(facts, [], loss))


def teacher_of(chunk_tokens: int, **head: Any) -> Teacher:
    model = create_model(replace(BERT, head=HeadConfig(**head)))
    processor: Any = None
    return Teacher(model, processor, GradCacheSection(chunk_tokens=chunk_tokens))


@pytest.mark.parametrize("unit", [True, False])
def test_embeddings_are_those_of_each_row_by_itself(unit: bool) -> None:
    batch, model = texts(7, 3), create_model(BERT).eval()
    expected = torch.cat([model(batch.select([i])).values for i in range(7)]).detach()
    got = teacher_of(20, normalize=unit).encode(batch)
    torch.testing.assert_close(got, normalize(expected, dim=1) if unit else expected)
    assert not got.requires_grad
    assert got.dtype == torch.float32


def test_weights_are_frozen_and_dropout_is_off() -> None:
    teacher = teacher_of(1000)
    assert not any(p.requires_grad for p in teacher._model.parameters())
    assert torch.equal(teacher.encode(texts(5, 1)), teacher.encode(texts(5, 1)))


def test_several_vectors_per_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="one vector per row"):
        teacher_of(20, pooling="none")

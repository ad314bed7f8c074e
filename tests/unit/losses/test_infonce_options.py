"""InfoNCE's options against sentence-transformers, and against the formula with all of them in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args
from unittest.mock import MagicMock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from vembed_fs2.losses import InfoNCE, InfoNCEConfig, RowInfo
from vembed_fs2.losses.infonce import Direction

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


def embeddings(rows: int, seed: int, dim: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


@contextmanager
def small_tiles(rows: int, strip_bytes: int = 1) -> Iterator[None]:
    """Let tiles have a few rows; strips of one row are the least there is."""
    with (
        patch("vembed_fs2.losses.tiles.choose_rows_per_tile", lambda blocks: rows),
        patch.dict("vembed_fs2.losses.tiles._STRIP_BYTES", cpu=strip_bytes),
    ):
        yield


def assert_same(loss: Tensor, expected: Tensor, leaves: list[Tensor], *, tolerance: float = 1e-5) -> None:
    """Check the value, and gradients relative to the largest of their tensor."""
    torch.testing.assert_close(loss.detach().double(), expected.detach().double(), rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(loss, leaves)
    references = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    for got, reference in zip(grads, references):
        scale = max(float(reference.abs().amax()) if reference.numel() else 0.0, 1.0)
        torch.testing.assert_close(got, reference.to(got.dtype), rtol=tolerance, atol=tolerance * scale)


def subsets(partition: str) -> list[tuple[Direction, ...]]:
    rest = DIRECTIONS[1:] if partition == "joint" else DIRECTIONS[1:2]
    chosen = [tuple(d for n, d in enumerate(rest) if bits >> n & 1) for bits in range(2 ** len(rest))]
    return [("query_to_document", *some) for some in chosen]


THEIR_DIRECTIONS = {d: d.replace("document", "doc") for d in DIRECTIONS}
THEIR_HARDNESS = {"none": None, "in_batch": "in_batch_negatives", "explicit": "hard_negatives", "all": "all_negatives"}


@cache
def identity() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(modules=[nn.Identity()])


@settings(max_examples=100)
@given(st.data())
def test_directions_partitions_and_hardness_equal_sentence_transformers(data: st.DataObject) -> None:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    partition = data.draw(st.sampled_from(["joint", "per_direction"]))
    directions = data.draw(st.sampled_from(subsets(partition)))
    hardness = data.draw(st.sampled_from(list(THEIR_HARDNESS)))
    strength = 0.0 if hardness == "none" else data.draw(st.sampled_from([0.5, 5.0, 9.0]))
    num, num_negatives, seed = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 2)), data.draw(st.integers(0, 99))
    q, *documents = leaves = [embeddings(num, seed + 100 * i) for i in range(2 + num_negatives)]
    theirs = MultipleNegativesRankingLoss(
        identity(),
        scale=10.0,
        directions=tuple(THEIR_DIRECTIONS[d] for d in directions),  # type: ignore[misc]
        partition_mode=partition,
        hardness_mode=THEIR_HARDNESS[hardness],  # type: ignore[arg-type]
        hardness_strength=strength,
    )
    expected = theirs.compute_loss_from_embeddings(leaves, torch.empty(0)) * num
    config = InfoNCEConfig(
        temperature=0.1,
        directions=data.draw(st.permutations(directions)),
        partition=partition,
        hardness=hardness,  # type: ignore[arg-type]
        hardness_strength=strength,
    )
    with small_tiles(data.draw(st.integers(1, 8))):
        loss = InfoNCE(config)(q, torch.cat(documents)).loss
    assert_same(loss, expected, leaves)


class Lookup(nn.Module):
    """Gives the embeddings that it is handed."""

    def __init__(self, key: str) -> None:
        from transformers import PreTrainedTokenizerBase

        super().__init__()
        self.key = key
        self.max_seq_length = 1
        self.tokenizer = MagicMock(spec=PreTrainedTokenizerBase)
        self.tokenizer.get_vocab.return_value = {}

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.key]}


@settings(max_examples=60)
@given(st.data())
def test_filtering_by_a_teacher_equals_gist_embed(data: st.DataObject) -> None:
    from sentence_transformers.losses import GISTEmbedLoss

    num, seed = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 99))
    num_sides = data.draw(st.sampled_from([2, 3]))
    margin_type = data.draw(st.sampled_from(["absolute", "relative"]))
    # With a negative margin, theirs may compare a query with itself.
    margin = data.draw(st.sampled_from([0.0, 0.1, 0.5]))
    anchors = data.draw(st.booleans())
    # With explicit negatives, theirs compares positives with positives only, ours with all documents.
    positives = num_sides == 2 and data.draw(st.booleans())
    leaves = [embeddings(num, seed + 100 * i) for i in range(num_sides)]
    teachers = [embeddings(num, seed + 1000 + 100 * i, 3).detach() for i in range(num_sides)]
    theirs = GISTEmbedLoss(
        Lookup("student"),  # type: ignore[arg-type]
        Lookup("teacher"),  # type: ignore[arg-type]
        temperature=0.1,
        margin_strategy=margin_type,
        margin=margin,
        contrast_anchors=anchors,
        contrast_positives=positives,
    )
    features = [{"student": x, "teacher": t} for x, t in zip(leaves, teachers)]
    expected = theirs(features, torch.empty(0)) * num
    directions = [DIRECTIONS[0]] + [DIRECTIONS[2]] * anchors + [DIRECTIONS[3]] * positives
    config = InfoNCEConfig(
        temperature=0.1,
        directions=directions,
        partition="joint",
        false_negatives="filter_by_teacher",
        false_negative_margin=margin,
        false_negative_margin_type=margin_type,
    )
    rows = RowInfo.distinct(num, num * (num_sides - 1))
    rows.teacher_query, rows.teacher_document = teachers[0], torch.cat(teachers[1:])
    with small_tiles(data.draw(st.integers(1, 8))):
        loss = InfoNCE(config)(leaves[0], torch.cat(leaves[1:]), rows).loss
    assert_same(loss, expected, leaves)


class Formula:
    """The loss with all options, row by row.

    :param q: the queries, in float64, as ``d``, the documents.
    """

    def __init__(self, q: Tensor, d: Tensor, rows: RowInfo, config: InfoNCEConfig, scale: Tensor) -> None:
        self.config = config
        self.scale = scale.squeeze()
        self.num = q.size(0)
        self.owner = rows.document_rows().tolist()
        self.ids = {"query": rows.query_ids.tolist(), "document": rows.document_ids.tolist()}
        self.labels = rows.labels.tolist()
        self.scores = self.compare(q, d, cosine=config.similarity == "cosine")
        self.values = {name: s.tolist() for name, s in self.scores.items()}
        self.judged = self.values
        if config.false_negatives == "filter_by_teacher":
            assert rows.teacher_query is not None
            assert rows.teacher_document is not None
            by_teacher = self.compare(rows.teacher_query.double(), rows.teacher_document.double(), cosine=True)
            self.judged = {name: s.tolist() for name, s in by_teacher.items()}
        self.num_negatives = self.num_found = 0
        self.loss = torch.stack([self.of_row(i) for i in range(self.num)]).sum()

    def compare(self, q: Tensor, d: Tensor, *, cosine: bool) -> dict[Any, Tensor]:
        sides = {"query": q, "document": d}
        if cosine:
            sides = {name: normalize(x, dim=-1) for name, x in sides.items()}
        return {name: sides[name.split("_to_")[0]] @ sides[name.split("_to_")[1]].T for name in DIRECTIONS}

    def of_row(self, i: int) -> Tensor:
        logits = [self.logits(i, direction) for direction in self.config.directions]
        if self.config.partition == "joint":
            log_sum = torch.logsumexp(torch.cat(logits), 0)
        else:
            log_sum = torch.stack([torch.logsumexp(z, 0) for z in logits]).mean()
        return log_sum - self.scale * self.scores["query_to_document"][i, i]

    def logits(self, i: int, direction: str) -> Tensor:
        z, values = self.scores[direction][i], self.values[direction][i]
        kept = [j for j in range(len(values)) if not self.is_left_out(i, j, direction)]
        if direction != "query_to_document":
            return self.scale * z[kept]
        if self.config.hardest is not None:
            negatives = sorted((j for j in kept if j != i), key=lambda j: -values[j])
            kept = [i, *negatives[: self.config.hardest]]
        self.num_negatives += len(kept) - 1
        self.num_found += all(values[j] < values[i] for j in kept if j != i)
        extra = [self.config.hardness_strength * values[j] * self.is_weighted(i, j) for j in kept]
        return self.scale * z[kept] + torch.tensor(extra, dtype=z.dtype)

    def is_weighted(self, i: int, j: int) -> bool:
        if j == i or self.config.hardness == "none":
            return False
        return self.config.hardness == "all" or (self.owner[j] == i) == (self.config.hardness == "explicit")

    def is_left_out(self, i: int, j: int, direction: str) -> bool:
        anchor, column = direction.split("_to_")
        if anchor != column and j == i:
            return False
        is_own = anchor == column and (self.owner[j] if column == "document" else j) == i
        return is_own or (self.config.mask_same and self.is_same(i, j, column)) or self.is_false(i, j, direction)

    def is_same(self, i: int, j: int, column: str) -> bool:
        query, document = self.ids["query"], self.ids["document"]
        if self.ids[column][j] in (query[i], document[i]):
            return True
        if column == "document" and j >= self.num:  # An explicit negative has no query or label.
            return False
        same_label = self.labels[i] != 0 and self.labels[i] == self.labels[j]
        return same_label or query[i] == query[j] or document[i] == document[j]

    def is_false(self, i: int, j: int, direction: str) -> bool:
        if self.config.false_negatives == "keep":
            return False
        positive, margin = self.judged["query_to_document"][i][i], self.config.false_negative_margin
        margin = margin * abs(positive) if self.config.false_negative_margin_type == "relative" else margin
        return bool(self.judged[direction][i][j] > positive - margin)


@st.composite
def configs(draw: st.DrawFn) -> InfoNCEConfig:
    partition = draw(st.sampled_from(["joint", "per_direction"]))
    hardness = draw(st.sampled_from(["none", "in_batch", "explicit", "all"]))
    false_negatives = draw(st.sampled_from(["keep", "filter", "filter_by_teacher"]))
    return InfoNCEConfig(
        temperature=draw(st.sampled_from([0.05, 0.5])),
        learn_temperature=draw(st.booleans()),
        directions=draw(st.sampled_from(subsets(partition))),
        partition=partition,  # type: ignore[arg-type]
        similarity=draw(st.sampled_from(["cosine", "dot"])),
        mask_same=draw(st.booleans()),
        hardest=draw(st.sampled_from([None, 1, 2, 100])),
        false_negatives=false_negatives,  # type: ignore[arg-type]
        false_negative_margin=0.0 if false_negatives == "keep" else draw(st.sampled_from([0.0, 0.3, -0.3])),
        false_negative_margin_type=draw(st.sampled_from(["absolute", "relative"])),
        hardness=hardness,  # type: ignore[arg-type]
        hardness_strength=0.0 if hardness == "none" else draw(st.sampled_from([2.0, 500.0])),
    )


@st.composite
def row_infos(draw: st.DrawFn) -> RowInfo:
    """Rows with different numbers of explicit negatives, of which some have the same label, query or document."""
    num = draw(st.integers(1, 6))
    owner = draw(st.lists(st.integers(0, num - 1), max_size=5))
    # Few distinct values, so that some are the same; or many.
    most = draw(st.sampled_from([8, 1000]))
    ids = st.lists(st.integers(1, most), min_size=2 * num + len(owner), max_size=2 * num + len(owner))
    content = torch.tensor(draw(ids))
    labels = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=num, max_size=num)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return RowInfo(
        content[:num],
        content[num:],
        labels,
        negative_rows=torch.tensor(owner, dtype=torch.int64),
        teacher_query=torch.randn(num, 3, generator=g),
        teacher_document=torch.randn(num + len(owner), 3, generator=g),
    )


@settings(max_examples=200)
@given(configs(), row_infos(), st.integers(0, 99), st.integers(1, 7), st.sampled_from([torch.float32, torch.float64]))
def test_all_options_together_equal_the_formula(
    config: InfoNCEConfig, rows: RowInfo, seed: int, rows_per_tile: int, dtype: torch.dtype
) -> None:
    num, total = rows.query_ids.size(0), rows.document_ids.size(0)
    q, d = embeddings(num, seed, dtype=dtype), embeddings(total, seed + 100, dtype=dtype)
    scale = torch.tensor([0.7], requires_grad=True)
    leaves = [q, d, scale] if config.learn_temperature else [q, d]
    with small_tiles(rows_per_tile):
        output = InfoNCE(config)(q, d, rows, scale)
    inverse = scale.exp() if config.learn_temperature else torch.tensor(1.0 / config.temperature)
    expected = Formula(q.double(), d.double(), rows, config, inverse.double())
    assert output.loss.dtype == dtype
    assert_same(output.loss, expected.loss, leaves)
    assert int(output.metrics["num_negatives"]) == expected.num_negatives
    assert int(output.metrics["accuracy"]) == expected.num_found
    masked = num * (total - 1) - expected.num_negatives
    assert float(output.metrics["masked_fraction"]) == pytest.approx(masked / max(total - 1, 1))


@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_frozen_embeddings_get_no_gradient_and_leave_that_of_others_alone(partition: Any) -> None:
    config = InfoNCEConfig(directions=subsets(partition)[-1], partition=partition)
    q, d = embeddings(5, 1), embeddings(10, 2)
    expected = torch.autograd.grad(InfoNCE(config)(q, d).loss, [q, d])
    (q_grad,) = torch.autograd.grad(InfoNCE(config)(q, d.detach()).loss, [q])
    (d_grad,) = torch.autograd.grad(InfoNCE(config)(q.detach(), d).loss, [d])
    torch.testing.assert_close((q_grad, d_grad), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_gradients_of_low_precision_are_those_of_float32_rounded_once(dtype: torch.dtype, partition: Any) -> None:
    config = InfoNCEConfig(directions=subsets(partition)[-1], partition=partition)
    low = [embeddings(n, n, 32, dtype) for n in (40, 80)]
    high = [x.detach().float().requires_grad_() for x in low]
    with small_tiles(7):
        grads = torch.autograd.grad(InfoNCE(config)(*low).loss, low)
        references = torch.autograd.grad(InfoNCE(config)(*high).loss, high)
    for got, reference in zip(grads, references):
        assert got.dtype == dtype
        unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(got.float(), reference, rtol=1.001 * unit, atol=1e-6)


def test_small_gradients_of_float16_survive_with_a_loss_scale() -> None:
    low = [(embeddings(n, n, 32).detach() * 1000).half().requires_grad_() for n in (40, 80)]
    high = [x.detach().float().requires_grad_() for x in low]
    references = torch.autograd.grad(InfoNCE(InfoNCEConfig(temperature=1.0))(*high).loss * 1e-4, high)
    assert float(references[0].abs().amax()) < 2**-25  # Less than half of the smallest number of float16.
    loss = InfoNCE(InfoNCEConfig(temperature=1.0))(*low).loss * 1e-4
    for got, reference in zip(torch.autograd.grad(loss * 2.0**20, low), references):
        largest = float(reference.abs().amax())
        torch.testing.assert_close(got.float() / 2.0**20, reference, rtol=1e-3, atol=1e-2 * largest)


def test_positives_that_lose_by_far_have_finite_losses_and_gradients() -> None:
    q, d = torch.eye(4), torch.eye(4).roll(1, 0)
    q.requires_grad_()
    output = InfoNCE(InfoNCEConfig(temperature=0.005))(q, d)
    (grad,) = torch.autograd.grad(output.loss, [q])
    assert float(output.loss.detach()) == pytest.approx(4 * 200.0)
    assert bool(grad.isfinite().all())


def test_negatives_that_are_just_as_similar_are_no_false_ones() -> None:
    rows = RowInfo.distinct(3, 3)
    rows.teacher_query, rows.teacher_document = torch.eye(3), torch.ones(3, 3)
    config = InfoNCEConfig(false_negatives="filter_by_teacher")
    assert int(InfoNCE(config)(embeddings(3, 1), embeddings(3, 2), rows).metrics["num_negatives"]) == 6
    config = InfoNCEConfig(false_negatives="filter_by_teacher", false_negative_margin=0.01)
    assert int(InfoNCE(config)(embeddings(3, 1), embeddings(3, 2), rows).metrics["num_negatives"]) == 0


def test_explicit_negatives_of_unknown_rows_are_an_error_where_their_rows_matter() -> None:
    q, d = embeddings(3, 1), embeddings(5, 2)
    for values in (
        {"hardness": "in_batch", "hardness_strength": 1.0},
        {"directions": ["query_to_document", "document_to_document"], "partition": "joint"},
    ):
        with pytest.raises(ValueError, match=r"`rows\.negative_rows` must say whose they are"):
            InfoNCE(InfoNCEConfig(**values))(q, d)  # type: ignore[arg-type]
    InfoNCE(InfoNCEConfig(hardness="all", hardness_strength=1.0))(q, d)


def test_filtering_by_a_teacher_without_one_is_an_error() -> None:
    loss = InfoNCE(InfoNCEConfig(false_negatives="filter_by_teacher"))
    assert loss.needs_teacher
    with pytest.raises(ValueError, match="needs its embeddings of queries and documents"):
        loss(embeddings(3, 1), embeddings(3, 2))
    assert not InfoNCE().needs_teacher


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"partition": "all"}, "`partition` must be one of per_direction, joint"),
        ({"directions": ["query_to_query"]}, "must hold 'query_to_document', and each direction once"),
        ({"directions": ["query_to_document"] * 2}, "must hold 'query_to_document', and each direction once"),
        ({"directions": ["query_to_document", "q2d"]}, "`directions` must hold .*, but holds 'q2d'"),
        ({"directions": DIRECTIONS}, "`partition` must be 'joint' with document_to_document, query_to_query"),
        ({"hardest": 0}, "`hardest` must be greater than or equal to 1, but is 0"),
        ({"hardness": "explicit"}, "`hardness` and `hardness_strength` must be given together"),
        ({"hardness_strength": 1.0}, "`hardness` and `hardness_strength` must be given together"),
        ({"hardness": "all", "hardness_strength": -1.0}, "`hardness_strength` must be finite and not negative"),
        ({"hardness": "all", "hardness_strength": math.nan}, "`hardness_strength` must be finite and not negative"),
        ({"false_negatives": "drop"}, "`false_negatives` must be one of keep, filter, filter_by_teacher"),
        ({"false_negative_margin": 0.1}, "`false_negative_margin` is for a `false_negatives` other than 'keep'"),
        (
            {"false_negatives": "filter", "false_negative_margin": math.inf},
            "`false_negative_margin` must be finite, but is inf",
        ),
    ],
)
def test_a_wrong_option_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfoNCE(InfoNCEConfig(**values))

"""Rows with a label only: every objective that can use them against its formula, written down plainly, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import softplus

from vembed_fs2.losses import LOSSES, Combined, Objective, RowInfo, create_loss

from . import objectives
from .objectives import Case, embeddings, same_label, similarities

ZERO: Final = torch.zeros((), dtype=torch.float64)


def assert_equal(loss: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """Also where nothing depends on the leaves."""
    objectives.assert_equal(loss, expected + sum(0.0 * x.double().sum() for x in leaves), leaves)


BY_LABEL: Final = {"infonce", "multi_positive", "sigmoid", "spread", "triplet"}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows of which some, or all, have a label only; some are copies, some have explicit negatives."""
    num = draw(st.integers(1, 7))
    one_sided = draw(st.one_of(st.just([True] * num), st.lists(st.booleans(), min_size=num, max_size=num)))
    small = st.integers(1, 12)  # Small, so that some are the same.
    ids = draw(st.lists(small, min_size=num, max_size=num))
    docs = draw(st.lists(small, min_size=num, max_size=num + 3))
    docs[:num] = [i if alone else d for i, d, alone in zip(ids, docs, one_sided)]
    labels = draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
    rows = RowInfo(*(torch.tensor(x) for x in (ids, docs, labels)), one_sided=torch.tensor(one_sided))
    return Case(rows, draw(st.integers(0, 99)), draw(st.integers(1, 3)))


def one_tensor(case: Case, q: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and documents, which are the same for rows of one side."""
    assert case.rows.one_sided is not None
    return torch.where(case.rows.one_sided.unsqueeze(1), d[: case.num_queries], q), d


@dataclass
class Sides:
    """Of one anchor."""

    positives: list[int]
    negatives: list[int]


def sides(rows: RowInfo, i: int, mask: bool) -> Sides:
    """The documents that are positives and negatives of a query."""
    ids, docs = rows.query_ids.tolist(), rows.document_ids.tolist()
    num = len(ids)
    assert rows.one_sided is not None
    alone = bool(rows.one_sided[i])
    found = Sides([], [])
    for j in range(len(docs)):
        mate = j < num and same_label(rows, i, j)
        copy = docs[j] in (docs[i], ids[i]) or (j < num and ids[j] == ids[i])
        if j == i:
            found.positives += [] if alone else [j]
        elif alone and mate:
            found.positives += [j] if not (mask and docs[j] == ids[i]) else []
        elif not (mask and (mate or copy)):
            found.negatives.append(j)
    return found


def infonce(s: Tensor, found: Sides, options: dict[str, Any], scale: float) -> Tensor:
    positives, negatives = s[found.positives], s[found.negatives]
    if not found.positives:
        return ZERO
    if options.get("false_negatives") == "filter":
        negatives = negatives[negatives <= positives.max() - options["false_negative_margin"]]
    if (hardest := options.get("hardest")) is not None:
        negatives = negatives.sort(descending=True).values[:hardest]
    logits = negatives * scale + negatives.detach() * options.get("hardness_strength", 0.0)
    parts = [torch.logsumexp(torch.cat([p.view(1) * scale, logits]), 0) - p * scale for p in positives]
    return torch.stack(parts).mean()


INFONCE: Final[list[dict[str, Any]]] = [
    {},
    {"hardest": 2},
    {"false_negatives": "filter", "false_negative_margin": 0.1},
    {"hardness": "all", "hardness_strength": 2.0},
]


@settings(max_examples=80)
@given(cases(), st.sampled_from(INFONCE), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0.5, 10.0]))
def test_infonce(case: Case, options: dict[str, Any], mask: bool, learn: bool, cosine: bool, scale: float) -> None:
    leaves = list(case.embeddings())
    values = {"temperature": 1 / scale, "mask_same": mask, "similarity": "cosine" if cosine else "dot", **options}
    loss = create_loss("infonce", LOSSES["infonce"].config_kls(learn_temperature=learn, **values))
    log_scale = torch.tensor([math.log(scale)], requires_grad=True)
    with case.tiles():
        output = loss(*one_tensor(case, *leaves), case.rows, log_scale if learn else None)

    s = similarities(*one_tensor(case, *leaves), cosine=cosine)
    exact = log_scale.double().exp().squeeze()
    parts = []
    for i in range(case.num_queries):
        found = sides(case.rows, i, mask)
        parts.append(infonce(s[i], found, options, exact))
    assert_equal(output.loss, torch.stack(parts).sum(), [*leaves, log_scale] if learn else leaves)
    if mask:
        check_counts(output.metrics, case, s, options)


def check_counts(metrics: dict[str, Tensor], case: Case, s: Tensor, options: dict[str, Any]) -> None:
    all_sides = [sides(case.rows, i, True) for i in range(case.num_queries)]
    assert int(metrics["without_positive"]) == sum(not x.positives for x in all_sides)
    if not options:
        assert int(metrics["num_negatives"]) == sum(len(x.negatives) for x in all_sides)
        found = [
            x.positives and s[i][x.positives].max() > (s[i][x.negatives].max() if x.negatives else -math.inf)
            for i, x in enumerate(all_sides)
        ]
        assert int(metrics["accuracy"]) == sum(map(bool, found))
        alone = case.rows.one_sided
        assert alone is not None
        masked = sum(
            case.num_documents - int(alone[i]) - len(x.positives) - len(x.negatives) for i, x in enumerate(all_sides)
        )
        assert float(metrics["masked_fraction"]) == pytest.approx(masked / max(case.num_documents - 1, 1))


@settings(max_examples=60)
@given(cases(), st.booleans(), st.booleans(), st.sampled_from([0.5, 10.0]))
def test_multi_positive_is_supervised_contrastive_learning(
    case: Case, symmetric: bool, mask: bool, scale: float
) -> None:
    """Khosla et al. (2020), equation 2, with the query and the documents of a row as one view."""
    case.rows.one_sided = torch.ones(case.num_queries, dtype=torch.bool)
    case.rows.document_ids = torch.cat([case.rows.query_ids, case.rows.document_ids[case.num_queries :]])
    leaves = list(case.embeddings())
    config = LOSSES["multi_positive"].config_kls(temperature=1 / scale, symmetric=symmetric, mask_same=mask)
    with case.tiles():
        output = create_loss("multi_positive", config)(*one_tensor(case, *leaves), case.rows)

    def one_way(s: Tensor) -> Tensor:
        total = ZERO
        for i in range(case.num_queries):
            found = sides(case.rows, i, mask)
            columns = [j for j in found.positives + found.negatives if j < s.size(1)]
            for p in found.positives:
                total = total - (s[i, p] * scale - torch.logsumexp(s[i, columns] * scale, 0)) / len(found.positives)
        return total

    s = similarities(*one_tensor(case, *leaves))
    expected = (one_way(s) + one_way(s[:, : case.num_queries].T)) / 2 if symmetric else one_way(s)
    assert_equal(output.loss, expected, leaves)
    if mask:
        check_counts(output.metrics, case, s, {})


@settings(max_examples=80)
@given(cases(), st.sampled_from(["hardest", "semi_hard", "all"]), st.booleans(), st.booleans(), st.booleans())
def test_triplet(case: Case, mining: str, soft: bool, mask: bool, cosine: bool) -> None:
    leaves = list(case.embeddings())
    config = LOSSES["triplet"].config_kls(
        margin=0.3, soft_margin=soft, mining=mining, mask_same=mask, similarity="cosine" if cosine else "dot"
    )
    with case.tiles():
        output = create_loss("triplet", config)(*one_tensor(case, *leaves), case.rows)

    def phi(x: Tensor) -> Tensor:
        return softplus(x) if soft else x.clamp_min(0.0)

    s, parts = similarities(*one_tensor(case, *leaves), cosine=cosine), []
    for i in range(case.num_queries):
        found = sides(case.rows, i, mask)
        positives, negatives = s[i][found.positives], s[i][found.negatives]
        if not found.positives or not found.negatives:
            parts.append(ZERO)
        elif mining == "hardest":  # Hermans et al. (2017), equation 5.
            parts.append(phi(0.3 + negatives.max() - positives.min()))
        elif mining == "semi_hard":
            chosen = [negatives[negatives < p].max() if (negatives < p).any() else negatives.min() for p in positives]
            parts.append(torch.stack([phi(0.3 + n - p) for n, p in zip(chosen, positives)]).mean())
        else:  # Equation 6, and the mean over the triplets whose loss is not zero.
            x = 0.3 + negatives.unsqueeze(0) - positives.unsqueeze(1)
            parts.append(phi(x).sum() / max(int((x > 0).sum()) if not soft else x.numel(), 1))
    assert_equal(output.loss, torch.stack(parts).sum(), leaves)
    if mask:
        check_counts(output.metrics, case, s, {})


@settings(max_examples=80)
@given(cases(), st.sampled_from(["mask", "positive", "negative"]), st.booleans())
def test_sigmoid(case: Case, same: str, learn: bool) -> None:
    """Zhai et al. (2023), equation 1: the sum over all pairs of a row."""
    leaves = list(case.embeddings())
    values: dict[str, Any] = {"learn_temperature": learn, "learn_bias": learn, "same": same}
    config = LOSSES["sigmoid"].config_kls(temperature=0.2, bias=-2.0, **values)
    log_scale = torch.tensor([math.log(5.0)], requires_grad=True)
    bias = torch.tensor([-2.0], requires_grad=True)
    parts = {"logit_scale": log_scale, "logit_bias": bias} if learn else {}
    with case.tiles():
        output = create_loss("sigmoid", config)(*one_tensor(case, *leaves), case.rows, **parts)

    z = similarities(*one_tensor(case, *leaves)) * log_scale.double().exp() + bias.double()
    total = ZERO
    for i in range(case.num_queries):
        found, strict = sides(case.rows, i, same != "negative"), sides(case.rows, i, False)
        positives = set(found.positives)
        if same == "positive":  # All that is known to be no negative, but not the row itself.
            positives |= set(range(case.num_documents)) - set(found.negatives) - {i}
        if same == "negative":
            positives, found = set(strict.positives), strict
        if positives:
            total = total + sum((softplus(-z[i, j]) for j in positives), ZERO)
            total = total + sum((softplus(z[i, j]) for j in found.negatives), ZERO)
    assert_equal(output.loss, total, [*leaves, log_scale, bias] if learn else leaves)
    if same == "mask":
        check_counts(output.metrics, case, z, {})


@pytest.mark.parametrize("name", sorted(BY_LABEL - {"spread"}))
def test_pairs_beside_rows_with_a_label_only_are_what_they_were(name: str) -> None:
    """No row of the batch has the label of the one that has no positive, so it only adds a negative."""
    q, d = embeddings(6, 1), embeddings(8, 2)
    alone = torch.tensor([False] * 5 + [True])
    labels = torch.tensor([1, 1, 0, 2, 0, 3])
    rows = RowInfo(torch.arange(6) + 10, torch.arange(8) + 20, labels)
    rows.query_ids[5] = rows.document_ids[5]
    kls = LOSSES[name].config_kls
    config = kls(learn_temperature=False, learn_bias=False) if name == "sigmoid" else kls()
    loss = create_loss(name, config)
    both = torch.where(alone.unsqueeze(1), d[:6], q)
    got = loss(both, d, replace(rows, one_sided=alone))
    # As an explicit negative, the last row would be the negative of all others as well.
    order = torch.tensor([0, 1, 2, 3, 4, 6, 7, 5])
    expected = loss(q[:5], d[order], RowInfo(rows.query_ids[:5], rows.document_ids[order], labels[:5]))
    assert_equal(got.loss, expected.loss.double(), [q, d])
    assert float(got.metrics["accuracy"]) == float(expected.metrics["accuracy"])
    assert float(got.metrics["without_positive"]) == 1.0


@pytest.mark.parametrize("options", [{"directions": ["query_to_document", "document_to_query"]}, {}])
def test_directions_of_one_side_are_the_same(options: Any) -> None:
    x, rows = embeddings(6, 4), RowInfo.of_labels(torch.tensor([1, 1, 2, 2, 2, 3]))
    loss = create_loss("infonce", LOSSES["infonce"].config_kls(**options))(x, x, rows).loss
    assert float(loss.detach()) == pytest.approx(float(create_loss("infonce")(x, x, rows).loss.detach()), rel=1e-6)


def test_one_partition_leaves_out_what_is_no_negative_in_any_direction() -> None:
    x, labels = embeddings(5, 4), [1, 1, 2, 2, 2]
    directions = ["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
    config = LOSSES["infonce"].config_kls(directions=directions, partition="joint", temperature=0.5)
    loss = create_loss("infonce", config)(x, x, RowInfo.of_labels(torch.tensor(labels))).loss
    s, total = similarities(x, x) * 2.0, ZERO
    for i, label in enumerate(labels):
        others = torch.cat([s[i][[j for j in range(5) if labels[j] != label]]] * 4)
        positives = [j for j in range(5) if j != i and labels[j] == label]
        for p in positives:
            part = torch.logsumexp(torch.cat([s[i, p].view(1), others]), 0) - s[i, p]
            total = total + part / len(positives)
    assert_equal(loss, total, [x])


@pytest.mark.parametrize("name", sorted(BY_LABEL))
def test_rows_that_have_nobody(name: str) -> None:
    """Not a single label twice; and a single row, which is compared with nothing."""
    for labels in ([1, 2, 0], [1], []):
        x = embeddings(len(labels), 5)
        kls = LOSSES[name].config_kls
        config = kls(learn_temperature=False, learn_bias=False) if name == "sigmoid" else kls()
        output = create_loss(name, config)(x, x, RowInfo.of_labels(torch.tensor(labels, dtype=torch.int64)))
        output.loss.backward()
        assert x.grad is None or bool(x.grad.isfinite().all())
        if name != "spread":
            assert float(output.loss.detach()) == 0.0
            assert int(output.metrics["without_positive"]) == len(labels)
            assert x.grad is None or not bool(x.grad.any())


def test_late_interaction() -> None:
    x, rows = embeddings(20, 6).view(5, 4, 6), RowInfo.of_labels(torch.tensor([1, 1, 2, 2, 2]))
    loss = create_loss("infonce", LOSSES["infonce"].config_kls(similarity="maxsim", temperature=0.5))(x, x, rows).loss
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    s = torch.einsum("bld,mkd->bmlk", unit, unit).amax(3).sum(2)
    total = sum((infonce(s[i], sides(rows, i, True), {}, 2.0) for i in range(5)), ZERO)
    assert_equal(loss, total, [x])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_objectives_say_whether_they_can(name: str) -> None:
    config = None
    if name == "matryoshka":
        config = LOSSES[name].config_kls(dims=[4])
    if name == "combined":
        return
    assert create_loss(name, config).uses_labels == (name in BY_LABEL | {"matryoshka"})


def test_several_objectives_can_if_all_can() -> None:
    parts: dict[str, Objective] = {"infonce": create_loss("infonce"), "spread": create_loss("spread")}
    assert Combined(parts).uses_labels
    assert not Combined({**parts, "cosent": create_loss("cosent")}).uses_labels


def test_the_flags_must_fit_the_rows() -> None:
    x, rows = embeddings(3, 1), RowInfo.of_labels(torch.tensor([1, 1, 2]))
    with pytest.raises(ValueError, match=r"`rows\.one_sided` must have 3 entries, but has 2"):
        create_loss("infonce")(x, x, replace(rows, one_sided=torch.tensor([True, True])))

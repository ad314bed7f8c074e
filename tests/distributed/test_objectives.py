"""Every objective over ranks gives what one process gives for the rows of all of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from vembed_fs2.distributed import RowGather
from vembed_fs2.losses import Objective, RowInfo
from vembed_fs2.losses.cosent import AnglE, AnglEConfig, CoSENT, CoSENTConfig
from vembed_fs2.losses.multi_positive import MultiPositive, MultiPositiveConfig
from vembed_fs2.losses.sigmoid import Sigmoid, SigmoidConfig
from vembed_fs2.losses.spread import Spread, SpreadConfig
from vembed_fs2.losses.triplet import Triplet, TripletConfig

from .spawn import run_ranks
from .test_losses import rank_rows as plain_rows

Create = Callable[[RowGather | None, Any], Objective]

# Each takes what gathers, and `negatives`.
OBJECTIVES: Final[dict[str, Create]] = {
    "sigmoid": lambda g, n: Sigmoid(SigmoidConfig(negatives=n), g),
    "sigmoid positive": lambda g, n: Sigmoid(SigmoidConfig(negatives=n, same="positive", similarity="dot"), g),
    "triplet hardest": lambda g, n: Triplet(TripletConfig(negatives=n), g),
    "triplet semi-hard": lambda g, n: Triplet(TripletConfig(negatives=n, mining="semi_hard", mask_same=False), g),
    "triplet all": lambda g, n: Triplet(TripletConfig(negatives=n, mining="all", soft_margin=True), g),
    "cosent": lambda g, n: CoSENT(CoSENTConfig(negatives=n, temperature=0.5), g),
    "angle": lambda g, n: AnglE(AnglEConfig(negatives=n, temperature=0.5), g),
    "multi-positive": lambda g, n: MultiPositive(
        MultiPositiveConfig(negatives=n, symmetric=True, learn_temperature=True), g
    ),
    "spread moments": lambda g, n: Spread(SpreadConfig(negatives=n), g),
    "spread uniformity": lambda g, n: Spread(SpreadConfig(negatives=n, kind="uniformity"), g),
}

# Ranks, and the one that has no rows.
WORLDS: Final = [(2, None), (3, None), (3, 1)]

Rows = tuple[Tensor, Tensor, RowInfo]


@dataclass
class Result:
    loss: Tensor
    grads: list[Tensor]
    """Of queries, documents, log scale and bias."""

    metrics: dict[str, float]


def rank_rows(rank: int, empty: int | None) -> Rows:
    """A rank's rows: of uneven numbers, some with explicit negatives, labels, scores and copies on other ranks."""
    q, d, rows = plain_rows(rank)
    b, m = q.size(0), d.size(0)
    rows.negative_rows = torch.arange(b, m) % b
    scores = torch.arange(m) % 3 / 2 - 0.1 * rank
    scores[b + 1 :] = torch.nan  # Explicit negatives need no score.
    rows.scores = scores
    if rank != empty:
        return q, d, rows
    none = RowInfo(*(x[:0] for x in (rows.query_ids, rows.document_ids, rows.labels)))
    return q[:0], d[:0], replace(none, negative_rows=rows.negative_rows[:0], scores=scores[:0])


def all_rows(ranks: list[Rows]) -> Rows:
    """The rows of all ranks as one process has them: all positives come before all explicit negatives."""
    sizes = [q.size(0) for q, _, _ in ranks]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    infos = [rows for _, _, rows in ranks]
    info = RowInfo(
        torch.cat([i.query_ids for i in infos]),
        split_and_join([i.document_ids for i in infos], sizes),
        torch.cat([i.labels for i in infos]),
        negative_rows=torch.cat([i.negative_rows + start for i, start in zip(infos, starts)]),  # type: ignore[operator]
        scores=split_and_join([i.scores for i in infos], sizes),  # type: ignore[misc]
    )
    return torch.cat([q for q, _, _ in ranks]), split_and_join([d for _, d, _ in ranks], sizes), info


def split_and_join(parts: list[Tensor], sizes: list[int]) -> Tensor:
    return torch.cat([p[:n] for p, n in zip(parts, sizes)] + [p[n:] for p, n in zip(parts, sizes)])


def evaluate(loss: Objective, rows: Rows) -> Result:
    query, document, info = rows
    scale, bias = torch.tensor([1.3]), torch.tensor([-2.0])
    leaves = [x.clone().requires_grad_() for x in (query, document, scale, bias)]
    output = loss(leaves[0], leaves[1], info, leaves[2], logit_bias=leaves[3])
    grads = torch.autograd.grad(output.loss, leaves, allow_unused=True, materialize_grads=True)
    return Result(output.loss.detach(), list(grads), {k: float(v) for k, v in output.metrics.items()})


def on_rank(rank: int) -> bytes:
    """*Returns:* for each way to fill the ranks, the result of each objective with the rows of all ranks and with its
    own rows only; and what it says of missing scores."""
    dist.init_process_group("gloo")
    gather = RowGather(dist.group.WORLD)
    results = {}
    for empty in [e for size, e in WORLDS if size == gather.size]:
        rows = rank_rows(rank, empty)
        for name, create in OBJECTIVES.items():
            for negatives in ("global", "local"):
                results[empty, name, negatives] = vars(evaluate(create(gather, negatives), rows))
    content = io.BytesIO()  # Tensors would be shared memory, which ends with the process.
    torch.save((results, missing_scores(rank, gather)), content)
    return content.getvalue()


def missing_scores(rank: int, gather: RowGather) -> list[str]:
    messages = []
    for broken in ("one", "all"):
        q, d, rows = rank_rows(rank, None)
        assert rows.scores is not None
        if rank == 1:
            rows.scores[0] = torch.nan
        if broken == "all":
            rows.scores = None
        with pytest.raises(ValueError, match="give `scores`") as caught:
            CoSENT(gather=gather)(q, d, rows)
        messages.append(str(caught.value))
    return messages


@cache
def run(size: int) -> list[Any]:
    """Start as many processes, once for all tests. *Returns:* what each found."""
    return [torch.load(io.BytesIO(content)) for content in run_ranks(on_rank, size)]


@pytest.fixture(scope="module", params=WORLDS, ids=["2 ranks", "3 ranks", "3 ranks, one without rows"])
def world(request: pytest.FixtureRequest) -> tuple[list[Rows], Callable[[str, str], list[Result]]]:
    """*Returns:* the rows of each rank, and its results by the name of the objective and by ``negatives``."""
    size, empty = request.param

    def results(name: str, negatives: str) -> list[Result]:
        return [Result(**found[empty, name, negatives]) for found, _ in run(size)]

    return [rank_rows(r, empty) for r in range(size)], results


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_of_all_ranks_equal_a_single_process(name: str, world: Any) -> None:
    ranks, results_of = world
    results = results_of(name, "global")
    expected = evaluate(OBJECTIVES[name](None, "global"), all_rows(ranks))
    sizes = [q.size(0) for q, _, _ in ranks]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.stack([r.loss for r in results]).sum(), expected.loss, **close)
    assert float(expected.loss) != 0.0
    query, document, *scalars = expected.grads
    torch.testing.assert_close(torch.cat([r.grads[0] for r in results]), query, **close)
    torch.testing.assert_close(split_and_join([r.grads[1] for r in results], sizes), document, **close)
    for idx, scalar in enumerate(scalars):
        torch.testing.assert_close(sum(r.grads[2 + idx] for r in results), scalar, **close)
    for metric, value in expected.metrics.items():
        assert sum(r.metrics[metric] for r in results) == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    assert all(r.metrics.keys() == expected.metrics.keys() for r in results)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_local_negatives_are_those_of_the_own_rank(name: str, world: Any) -> None:
    ranks, results_of = world
    for rows, got in zip(ranks, results_of(name, "local")):
        expected = evaluate(OBJECTIVES[name](None, "global"), rows)
        assert torch.equal(got.loss, expected.loss)
        for grad, reference in zip(got.grads, expected.grads):
            assert torch.equal(grad, reference)
        assert got.metrics == expected.metrics


def test_a_missing_score_is_an_error_on_all_ranks() -> None:
    """A rank that went on alone would wait for the others for ever."""
    messages = [found[1] for found in run(2)]
    assert messages[0] == messages[1]

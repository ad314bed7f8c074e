"""Regularisers against sentence-transformers, and against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.losses import RowInfo, create_loss
from vembed_fs2.losses.spread import Spread, SpreadConfig

from .objectives import Case, assert_equal, cases, embeddings


def cosines(x: Tensor) -> Tensor:
    """Of all pairs of different rows, in float64. *Returns:* ``[N (N - 1)]``."""
    unit = normalize(x.double(), dim=-1)
    return (unit @ unit.T)[~torch.eye(x.size(0), dtype=torch.bool)]


def naive(x: Tensor, config: SpreadConfig) -> Tensor:
    s, zero = cosines(x), 0.0 * x.double().sum()
    if s.numel() == 0:
        return zero
    if config.kind == "uniformity":
        return torch.exp(-config.uniformity_scale * (2.0 - 2.0 * s)).mean().log()
    second = torch.relu(s.square().mean() - 1.0 / x.size(1))
    return config.mean_weight * s.mean().square() + config.second_moment_weight * second + zero


weights = st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0, 2.0])).filter(any)


@settings(max_examples=60)
@given(cases(), st.sampled_from(["global_orthogonal", "uniformity"]), weights, st.sampled_from([0.5, 2.0, 32.0]))
def test_value_and_gradient_are_those_of_the_formula(case: Case, kind: Any, weight: Any, scale: float) -> None:
    q, d = case.embeddings()
    config = SpreadConfig(kind=kind, mean_weight=weight[0], second_moment_weight=weight[1], uniformity_scale=scale)
    with case.tiles():
        output = Spread(config)(q, d, case.rows)
    expected = (naive(q, config) + naive(d, config)) / 2
    assert_equal(output.loss, expected, [q, d], factor=1 / case.num_queries)
    sides = [cosines(x.detach()) if x.size(0) > 1 else torch.zeros(1) for x in (q, d)]
    metrics = {"uniformity": float(expected.detach())}
    if kind == "global_orthogonal":
        metrics = {"mean_similarity": sum(float(s.mean()) for s in sides) / 2}
        if weight[1]:
            metrics["second_moment"] = sum(float(s.square().mean()) for s in sides) / 2
    got = {k: float(v) / case.num_queries for k, v in output.metrics.items()}
    assert got == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("mean", "second"), [(1.0, 1.0), (0.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_moments_equal_sentence_transformers(mean: float, second: float, seed: int) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import GlobalOrthogonalRegularizationLoss

    theirs = GlobalOrthogonalRegularizationLoss(
        SentenceTransformer(modules=[torch.nn.Identity()]), mean_weight=mean, second_moment_weight=second
    )
    q, d = embeddings(7, seed), embeddings(11, seed + 50)
    expected = torch.stack(list(theirs.compute_loss_from_embeddings([q, d]).values())).sum()
    output = Spread(SpreadConfig(mean_weight=mean, second_moment_weight=second))(q, d, RowInfo.distinct(7, 11))
    assert_equal(output.loss, expected, [q, d], factor=1 / 7)


def test_uniformity_is_that_of_all_distances() -> None:
    """As the paper gives it: over unordered pairs."""
    q, d = embeddings(8, 1), embeddings(8, 2)
    distances = [torch.pdist(normalize(x, dim=-1)).square() for x in (q, d)]
    expected = torch.stack([x.mul(-2.0).exp().mean().log() for x in distances]).mean()
    assert_equal(Spread(SpreadConfig(kind="uniformity"))(q, d).loss, expected, [q, d], factor=1 / 8)


@pytest.mark.parametrize("kind", ["global_orthogonal", "uniformity"])
def test_a_step_spreads_embeddings_out(kind: Any) -> None:
    q = (embeddings(20, 1).detach() + 2.0).requires_grad_()
    loss = Spread(SpreadConfig(kind=kind))
    (grad,) = torch.autograd.grad(loss(q, q).loss, q)
    assert cosines(q - 0.1 * grad).mean() < cosines(q).mean()


def test_moments_of_a_uniform_distribution_cost_nothing() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(400, 8, generator=g)
    output = Spread()(q, q)
    assert float(output.loss) / 400 < 1e-3
    assert float(Spread()(q * 0 + q[0], q).loss) / 400 > 0.5


@pytest.mark.parametrize("kind", ["global_orthogonal", "uniformity"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_low_precision_are_compared_in_float32(kind: Any, dtype: torch.dtype) -> None:
    q, d = embeddings(5, 1).to(dtype), embeddings(5, 2).to(dtype)
    loss = Spread(SpreadConfig(kind=kind))
    assert torch.equal(loss(q, d).loss, loss(q.float(), d.float()).loss)


@pytest.mark.parametrize("kind", ["global_orthogonal", "uniformity"])
@pytest.mark.parametrize("num", [0, 1])
def test_fewer_than_two_rows_give_a_loss_of_zero(kind: Any, num: int) -> None:
    q, d = embeddings(num, 1), embeddings(num, 2)
    output = Spread(SpreadConfig(kind=kind))(q, d)
    grads = torch.autograd.grad(output.loss, [q, d])
    assert float(output.loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert all(g.abs().sum() < 1e-6 for g in grads)


def test_several_vectors_per_row_are_an_error() -> None:
    with pytest.raises(ValueError, match="the model gives several per row"):
        Spread()(embeddings(6, 1).view(2, 3, 6), embeddings(6, 1).view(2, 3, 6))


def test_it_is_registered() -> None:
    assert isinstance(create_loss("spread"), Spread)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sphere"}, "`kind` must be one of global_orthogonal, uniformity"),
        ({"mean_weight": -1.0}, "`mean_weight` must not be negative, but is -1.0"),
        ({"second_moment_weight": math.nan}, "`second_moment_weight` must not be negative"),
        ({"mean_weight": 0.0, "second_moment_weight": 0.0}, "must not both be 0"),
        ({"uniformity_scale": 0.0}, "`uniformity_scale` must be positive"),
        ({"uniformity_scale": 100.0}, "`uniformity_scale` must be at most 32.0, but is 100.0"),
        ({"negatives": "all"}, "`negatives` must be one of global, local"),
    ],
)
def test_a_wrong_configuration_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spread(SpreadConfig(**values))

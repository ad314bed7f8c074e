"""Dropout on CPUs."""

from __future__ import annotations

import pytest
import torch

from vembed_fs2.models.common.dropout import Dropout, dropout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_with_the_probability_and_the_mean_is_kept(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(400_003, dtype=dtype), p)
    dropped = (y == 0).double().mean()
    assert abs(float(dropped) - p) < 5 * (p * (1 - p) / 400_003) ** 0.5 + 2**-15
    assert len(y.unique()) == 2
    torch.testing.assert_close(float(y.max()), 1 / (1 - p), rtol=1e-2, atol=0)


def test_what_is_dropped_is_independent_of_neighbours() -> None:
    torch.manual_seed(0)
    kept = dropout(torch.ones(400_000), 0.3).bool().double()
    for distance in (1, 2, 3, 4, 5):
        both = float((kept[:-distance] * kept[distance:]).mean())
        assert both == pytest.approx(0.49, abs=0.004)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_zero_where_the_output_is_and_scaled_elsewhere(dtype: torch.dtype) -> None:
    x = torch.randn(33, 7, dtype=dtype).T.requires_grad_()
    y = dropout(x, 0.4)
    grad = torch.randn(33, 7, dtype=dtype).T
    (got,) = torch.autograd.grad(y, x, grad)
    kept = y != 0
    scale = 2**15 / (2**15 - round(0.4 * 2**15))
    torch.testing.assert_close(y, torch.where(kept, x.detach() * scale, 0))
    torch.testing.assert_close(got, torch.where(kept, grad * scale, 0))
    assert 0 < int(kept.sum()) < kept.numel()


def test_the_same_elements_are_dropped_in_every_type_and_by_the_same_seed() -> None:
    masks = []
    for dtype in (*DTYPES, torch.float32):
        torch.manual_seed(3)
        masks.append(dropout(torch.ones(5, 11, dtype=dtype), 0.5) == 0)
    assert all(torch.equal(m, masks[0]) for m in masks)


def test_not_a_number_stays_where_it_is_kept_and_goes_where_it_is_dropped() -> None:
    torch.manual_seed(0)
    y = dropout(torch.full((1000,), torch.nan), 0.5)
    assert set(y.isnan().tolist()) == {True, False}
    assert (y[~y.isnan()] == 0).all()


def test_the_module_does_nothing_in_evaluation_mode_or_without_probability() -> None:
    x = torch.randn(10)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert (Dropout(1.0)(x) == 0).all()
    assert (Dropout(0.5)(torch.ones(100)) == 0).any()

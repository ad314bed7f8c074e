"""Inputs that need a gradient get the plain step's, whatever the budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.inputs import FeatureInputs
from vembed_fs2.gradcache import GradCache

BUDGETS = ["all", 0, "1KiB"]


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4).double()


def loss(*roles: Tensor) -> Tensor:
    a, b = roles[0], roles[-1]
    return (a @ b.T).exp().sum()


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    function(leaf).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_input_of_a_role_gets_its_gradient(linear: nn.Linear, budget: Any) -> None:
    expected = gradient(lambda z: loss(linear(z).tanh()), inputs())
    step = GradCache(lambda c: linear(c["x"]).tanh(), loss, chunk_tokens=2, activation_budget=budget)
    torch.testing.assert_close(gradient(lambda z: step({"x": z}), inputs()), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_roles_that_come_from_one_graph_get_their_gradients_once(linear: nn.Linear, budget: Any) -> None:
    """A trained layer before the call, of both roles."""
    before = nn.Linear(4, 4).double()

    def plain(z: Tensor) -> Tensor:
        y = before(z)
        return loss(linear(y).tanh(), linear(y * 2).tanh())

    step = GradCache(lambda c: linear(c["x"]).tanh(), loss, chunk_tokens=2, activation_budget=budget)

    def cached(z: Tensor) -> Tensor:
        y = before(z)
        return step({"x": y}, {"x": y * 2})

    expected = gradient(plain, inputs())
    layer = before.weight.grad
    before.zero_grad()
    torch.testing.assert_close(gradient(cached, inputs()), expected)
    torch.testing.assert_close(before.weight.grad, layer)


@pytest.mark.parametrize("budget", BUDGETS)
def test_pixels_and_features_get_their_gradients(linear: nn.Linear, budget: Any) -> None:
    def encode(batch: EncoderBatch) -> Tensor:
        part = batch.images if batch.features is None else batch.features
        assert part is not None
        return linear(part.values.flatten(1)).tanh()  # type: ignore[no-any-return]

    step = GradCache(encode, loss, chunk_tokens=2, activation_budget=budget)
    expected = gradient(lambda z: loss(linear(z).tanh()), inputs())
    pixels = gradient(lambda z: step(EncoderBatch.of_images(z.reshape(8, 1, 2, 2))), inputs())
    torch.testing.assert_close(pixels, expected)
    rows = torch.arange(8)
    features = gradient(lambda z: step(EncoderBatch(8, features=FeatureInputs(z[:, None], rows))), inputs())
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_leaf_that_encode_closes_over_gets_its_gradient(linear: nn.Linear, budget: Any) -> None:
    """Prompt tuning: a tensor that is added to every row."""
    expected = gradient(lambda z: loss(linear(inputs() + z[0]).tanh()), inputs(1))

    def cached(z: Tensor) -> Tensor:
        prompt = z[0].detach().requires_grad_()
        step = GradCache(lambda c: linear(c["x"] + prompt).tanh(), loss, chunk_tokens=2, activation_budget=budget)
        step({"x": inputs()}).backward()
        assert prompt.grad is not None
        return (z[0] * prompt.grad).sum()

    torch.testing.assert_close(gradient(cached, inputs(1)), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_graph_that_every_chunk_would_run_through_is_an_error_at_once(linear: nn.Linear, budget: Any) -> None:
    prompt = linear(torch.ones(4, dtype=torch.float64))
    encoders = [lambda c: linear(c["x"] + prompt), partial(lambda p, c: linear(c["x"] + p), prompt)]
    for encode in encoders:
        step = GradCache(encode, loss, chunk_tokens=2, activation_budget=budget)
        with pytest.raises(ValueError, match="computed before the call and needs a gradient"):
            step({"x": inputs()})
        with torch.no_grad():
            assert step({"x": inputs()}).isfinite()

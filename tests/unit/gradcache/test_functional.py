"""The decorators give the plain step's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vembed_fs2.gradcache import cached, cached_loss

from .test_engine import Batch, Encoder, assert_close, contrast, gradients, plain, texts


@cached
def encode(model: Encoder, batch: Batch) -> Tensor:
    return model(batch)


@cached
def encode_scaled(model: Encoder, batch: Batch, *, factor: float) -> Tensor:
    return model(batch) * factor


@cached_loss(chunk_tokens=24, activation_budget=0)
def weighted(queries: Tensor, documents: Tensor, weight: float = 1.0) -> Tensor:
    return contrast(queries, documents) * weight


def test_gradients_equal_the_plain_step() -> None:
    model, other = Encoder(), Encoder(seed=1)
    roles = texts(8, 1), texts(8, 2)
    plain([model, model], lambda q, d: contrast(q, d) * 3.0, *roles)
    reference = gradients(model)
    value = weighted(encode(model, roles[0]), encode(model, roles[1]), weight=3.0)
    value.backward()
    assert_close(gradients(model), reference)
    together = weighted.stats.num_chunks  # type: ignore[attr-defined]
    plain([model, other], lambda q, d: contrast(q, d) * 2.0, *roles)
    reference = gradients(model, other)
    weighted(encode(model, roles[0]), encode(other, roles[1]), 2.0).backward()
    assert_close(gradients(model, other), reference)
    assert weighted.stats.num_chunks >= together  # type: ignore[attr-defined]


def test_arguments_that_are_no_rows_are_passed_on() -> None:
    model = Encoder()
    fixed = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    plain(model, lambda q: contrast(q * 2.0, fixed), texts(8, 1))
    reference = gradients(model)
    weighted(encode_scaled(model, texts(8, 1), factor=2.0), fixed).backward()
    assert_close(gradients(model), reference)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: weighted(torch.ones(2, 2), torch.ones(2, 2)), "needs the result of a cached encode call"),
        (lambda: weighted(encode(Encoder(), texts(2, 1)), documents=encode(Encoder(), texts(2, 2))), "by position"),
        (lambda: encode(), "needs the batch"),
    ],
)
def test_wrong_arguments_are_errors(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()

"""Gradient cache: what happens when memory runs out."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vembed_fs2.gradcache import GradCache

from .test_engine import Batch, Encoder, contrast, gradients, texts
from .test_memory import Hold


class Scarce(nn.Module):
    """An encoder that runs out of memory while more than ``limit`` graphs are alive."""

    def __init__(self, limit: int, error: Exception) -> None:
        super().__init__()
        self.inner = Encoder(dropout=0.3)
        self.limit = limit
        self.error = error
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def forward(self, batch: Batch) -> Tensor:
        output = self.inner(batch)  # Draws random numbers before it fails.
        if not torch.is_grad_enabled():
            return output
        marker = _Marker()
        self.alive.add(marker)
        if len(self.alive) > self.limit:
            raise self.error
        return Hold.apply(output, marker)  # type: ignore[no-any-return]


class _Marker:
    pass


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_running_out_of_memory_lowers_the_budget_and_changes_nothing_else(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    roles = texts(12, 1), texts(12, 2)
    results = []
    for limit in (1000, 4):
        encoder = Scarce(limit, error)
        step = GradCache(encoder, contrast, chunk_tokens=24, activation_budget="all")
        kept = []
        for seed in (5, 6):
            torch.manual_seed(seed)
            step(*roles).backward()
            kept.append(step.stats.num_kept)
        results.append((gradients(encoder), kept, step.stats.num_chunks))
    (expected, all_kept, num_chunks), (got, kept, _) = results
    assert all(torch.equal(a, b) for a, b in zip(expected, got) if a is not None and b is not None)
    assert all_kept == [num_chunks] * 2
    assert kept[0] == 4
    assert 1 <= kept[1] <= 4
    assert sum("Memory ran out" in r.message for r in caplog.records) == 1


def test_other_errors_of_an_encoder_are_raised() -> None:
    encoder = Scarce(2, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        GradCache(encoder, contrast, chunk_tokens=24, activation_budget="all")(texts(12, 1), texts(12, 2))

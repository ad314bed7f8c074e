"""Gradients of embedding tables: added in place over chunks, and the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.utils.checkpoint import checkpoint

from vembed_fs2.gradcache import GradCache

from .test_engine import BUDGETS, Batch, assert_close, contrast, gradients, plain, texts

MAKES_WHOLE_TABLE = "aten::embedding_dense_backward"


class Lookups(nn.Module):
    """Texts through a table of 3,000 rows that is used twice, and one of padded rows."""

    def __init__(self, padding_idx: int | None = 0, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(3000, 16, padding_idx=padding_idx)
        self.types = nn.Embedding(1000, 16)
        self.dropout = nn.Dropout(0.2)
        self.outer = nn.Linear(16, 8)
        self.tied = tied

    def embed(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.words(ids * 2 + 1) + self.types(ids)
        return x if not self.tied else x + (x @ self.words.weight[:50].T) @ self.words.weight[:50]

    def forward(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(2)
        x = self.outer(self.dropout(torch.tanh(self.embed(batch["input_ids"]))))
        return (x * mask).sum(1) / mask.sum(1)


class Checkpointed(Lookups):
    def embed(self, ids: Tensor) -> Tensor:
        x: Tensor = checkpoint(super().embed, ids, use_reentrant=False)
        return x


def count_tables(value: Tensor) -> int:
    """Carry a step backward; return how many gradients of whole tables were made."""
    with profiler.profile() as profile:
        value.backward()
    return sum(event.name == MAKES_WHOLE_TABLE for event in profile.function_events)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("padding_idx", [0, None])
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_first_chunk_makes_a_gradient_of_the_whole_table(
    budget: Any, padding_idx: int | None, tied: bool
) -> None:
    model = Lookups(padding_idx, tied=tied).eval()
    roles = texts(8, 1), texts(9, 2, width=20)
    plain(model, contrast, *roles)
    reference = gradients(model)
    step = GradCache(model, contrast, chunk_tokens=40, activation_budget=budget)
    for _ in range(2):
        value = step(*roles)
        assert step.stats.num_chunks > 3
        assert count_tables(value) == 3
        assert_close(gradients(model), reference)


def test_accumulated_steps_add_up() -> None:
    model = Lookups().eval()
    roles = texts(8, 1), texts(9, 2, width=20)
    plain(model, contrast, *roles, scale=3.0)
    reference = gradients(model)
    step = GradCache(model, contrast, chunk_tokens=40)
    step(*roles).backward()
    (step(*roles) * 2).backward()
    assert_close(gradients(model), reference)


def test_dropout_and_the_budget_change_nothing() -> None:
    model = Lookups()
    roles = texts(8, 1), texts(9, 2, width=20)
    found = []
    for budget in BUDGETS:
        torch.manual_seed(1)
        GradCache(model, contrast, chunk_tokens=40, activation_budget=budget)(*roles).backward()
        found.append(gradients(model))
    for grads in found:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0]) if a is not None and b is not None)


@pytest.mark.parametrize("case", ["checkpointed", "hook", "post hook", "half", "frozen", "sparse"])
def test_tables_that_need_their_own_gradient_keep_it(case: str) -> None:
    model = Checkpointed() if case == "checkpointed" else Lookups()
    model.eval()
    weight, calls = model.words.weight, []
    if case == "hook":
        weight.register_hook(lambda grad: calls.append(1))
    elif case == "post hook":
        weight.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    elif case == "half":
        model.bfloat16()
    elif case == "frozen":
        weight.requires_grad_(False)
    elif case == "sparse":
        model.words.sparse = True
    roles = texts(8, 1), texts(9, 2, width=20)
    step = GradCache(model, contrast, chunk_tokens=40, activation_budget=0)
    plain(model, contrast, *roles)
    reference = [g.to_dense() if g is not None else None for g in gradients(model)]
    before = len(calls)
    step(*roles).backward()
    if case in ("hook", "post hook"):
        assert len(calls) - before == before * step.stats.num_chunks
    grads = [g.to_dense() if g is not None else None for g in gradients(model)]
    assert_close(grads, reference, 2e-2 if case == "half" else 1e-5)


def test_compiled_encoders_keep_their_own_way() -> None:
    model = Lookups().eval()
    roles = texts(8, 1), texts(9, 2, width=20)
    plain(model, contrast, *roles)
    reference = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    GradCache(compiled, contrast, chunk_tokens=40)(*roles).backward()
    assert_close(gradients(model), reference)

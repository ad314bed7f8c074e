"""Gradients of embedding tables are added in place under DDP and FSDP2 as well, and are the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import profiler

from vembed_fs2.distributed import RowGather
from vembed_fs2.gradcache import GradCache

from .spawn import run_ranks
from .steps import (
    BERT,
    create_model,
    full_gradients,
    loss_of,
    open_gangs,
    rank_batch,
    reference_gradient,
    relative_error,
    wrap,
)

WORDS = replace(BERT, vocab_size=3000, dropout_p=0.0, attn_dropout_p=0.0)

CHUNK_TOKENS = 40


def step_on_ranks(rank: int, kind: str) -> tuple[float, int, int]:
    gangs = open_gangs(sharded=kind == "fsdp")
    module = wrap(create_model(WORDS, checkpointing=True), WORDS, gangs, kind)
    step = GradCache(module, loss_of(RowGather(gangs.dp.as_process_group())), chunk_tokens=CHUNK_TOKENS)
    query, document, info = rank_batch(WORDS, rank, 6, 0)
    value = step(query, document, rows=info)
    with profiler.profile() as profile:
        value.backward()
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(2)
    batches = [[rank_batch(WORDS, r, 6, 0) for r in range(2)]]
    expected = reference_gradient(WORDS, batches, CHUNK_TOKENS, [100, 101], equal_counts=kind == "fsdp")
    num_tables = sum(event.name == "aten::embedding_dense_backward" for event in profile.function_events)
    return relative_error(full_gradients(module), expected), num_tables, step.stats.num_chunks


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_over_chunks_are_added_in_place_on_two_ranks(kind: str) -> None:
    torch.manual_seed(0)
    for error, num_tables, num_chunks in run_ranks(step_on_ranks, 2, kind):
        assert error <= 1e-5
        assert num_chunks > 3
        # Words and positions of the first chunk; segments, of which there are two, of every chunk.
        assert num_tables == 2 + num_chunks

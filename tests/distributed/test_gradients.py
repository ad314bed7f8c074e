"""The gradient of a cached step over several ranks is that of the plain full batch.

Dropout is on everywhere; the reference draws the same masks.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fairseq2.gang import ProcessGroupGang, create_parallel_gangs
from torch import Tensor

from vembed_fs2.distributed import RowGather
from vembed_fs2.gradcache import GradCache

from .exactness import copy_shards, own_shard
from .spawn import run_ranks
from .steps import (
    BERT,
    CLIP,
    CPU,
    create_model,
    full_gradients,
    loss_of,
    open_gangs,
    rank_batch,
    reference_gradient,
    relative_error,
    wrap,
)

CHUNK_TOKENS = 40

MODELS = {"bert": BERT, "clip": CLIP}

CASES = list(product(["clip"], [0, "all", "20KiB"], [1, 2], [1.0, 1024.0], [False, True]))
"""Model, budget, accumulated batches, loss scale, uneven ranks. Models of one tower are in ``test_exactness.py``."""


def run_case(
    module: Any, config: Any, case: tuple[Any, ...], rank: int, world_size: int, gather: RowGather
) -> tuple[Tensor, dict[str, Tensor]]:
    _, budget, accumulation, scale, uneven = case
    torch.manual_seed(100 + rank)
    step = GradCache(module, loss_of(gather), chunk_tokens=CHUNK_TOKENS, activation_budget=budget)
    for number in range(accumulation):
        query, document, info = rank_batch(config, rank, 7 - 2 * rank if uneven else 6, number)
        (step(query, document, rows=info) * scale).backward()
    # What fairseq2's trainer does: undo the averaging over ranks and the loss scale.
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(world_size / scale)
    grads = full_gradients(module)
    module.zero_grad(set_to_none=True)
    return grads


def reference(config: Any, case: tuple[Any, ...], world_size: int, *, equal_counts: bool = False) -> dict[str, Tensor]:
    _, _, accumulation, _, uneven = case
    batches = [
        [rank_batch(config, r, 7 - 2 * r if uneven else 6, n) for r in range(world_size)] for n in range(accumulation)
    ]
    seeds = [100 + r for r in range(world_size)]
    return reference_gradient(config, batches, CHUNK_TOKENS, seeds, equal_counts=equal_counts)


def compare_all(rank: int, kind: str, cases: list[tuple[Any, ...]]) -> list[float]:
    gangs = open_gangs(sharded=kind == "fsdp")
    gather = RowGather(gangs.dp.as_process_group())
    errors = []
    for case in cases:
        config = MODELS[case[0]]
        checkpointing = case[1] == "all"
        module = wrap(create_model(config, checkpointing=checkpointing), config, gangs, kind)
        grads = run_case(module, config, case, rank, gangs.dp.size, gather)
        expected = reference(config, case, gangs.dp.size, equal_counts=kind == "fsdp")
        errors.append(relative_error(grads, expected))
    return errors


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradient_equals_the_plain_full_batch_on_two_ranks(kind: str) -> None:
    errors = run_ranks(compare_all, 2, kind, CASES)
    for rank_errors in errors:
        worst = max(zip(rank_errors, CASES), key=lambda pair: pair[0])
        assert worst[0] <= 1e-5, worst


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("budget", [0, "all", "20KiB"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradient_equals_the_plain_full_batch_on_one_process(
    model: str, budget: Any, accumulation: int, scale: float
) -> None:
    case = (model, budget, accumulation, scale, False)
    config = MODELS[model]
    module = create_model(config)
    grads = run_case(module, config, case, 0, 1, RowGather())
    assert relative_error(grads, reference(config, case, 1)) <= 1e-5


def split_over_ranks(rank: int) -> float:
    """A tensor parallel step with dropout, of ranks with other seeds and other free memory."""
    gangs = create_parallel_gangs(ProcessGroupGang.create_default_process_group(CPU), tp_size=2)
    config = replace(BERT, attn_dropout_p=0.0)  # Each rank draws that of its own heads.
    module = create_model(config, gangs, checkpointing=True)
    copy_shards(create_model(config), module, rank)
    batch = rank_batch(config, 0, 6, 0)
    seeds = []
    for r in range(2):
        torch.manual_seed(100 + r)
        seeds.append(int(torch.randint(2**62, ())))
    torch.manual_seed(100 + rank)
    with patch("vembed_fs2.gradcache.engine.parse_budget", lambda budget, device: 2**14 * (3 - 2 * rank)):
        step = GradCache(module, loss_of(), chunk_tokens=CHUNK_TOKENS)
        step(*batch[:2], rows=batch[2]).backward()
    assert 1 < step.stats.num_kept < step.stats.num_chunks
    grads = full_gradients(module)
    expected = reference_gradient(config, [[batch]], CHUNK_TOKENS, [max(seeds)])
    return relative_error(grads, {name: own_shard(expected[name], g.shape, rank) for name, g in grads.items()})


def test_tensor_parallel_ranks_keep_the_same_graphs_and_draw_the_same_dropout() -> None:
    """Otherwise one rank's forward pass would meet another's backward pass, or what both hold would differ."""
    assert max(run_ranks(split_over_ranks, 2)) <= 1e-5


def count_reductions(rank: int, model: str, chunk_tokens: int) -> tuple[int, int, int]:
    """Run a DDP step; return the numbers of chunks, of reduced gradient elements, and of parameters."""
    gangs = open_gangs(sharded=False)
    config = MODELS[model]
    module = wrap(create_model(config), config, gangs, "ddp")
    step = GradCache(module, loss_of(), chunk_tokens=chunk_tokens, activation_budget=0)
    query, document, info = rank_batch(config, rank, 6, 0)
    value = step(query, document, rows=info)
    reduced = 0
    original = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal reduced
        reduced += tensor.numel() if tensor.is_floating_point() else 0
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    # DDP's own reducer calls none of Python's functions; it would show here.
    hook_calls = []
    module.register_comm_hook(None, lambda state, bucket: hook_calls.append(bucket))
    value.backward()
    assert not hook_calls
    return step.stats.num_chunks, reduced, sum(p.numel() for p in module.parameters() if p.grad is not None)


# One encoder is less than two.
@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] if m == "bert" else []) for m in MODELS])
def test_each_gradient_is_reduced_once_whatever_the_number_of_chunks(model: str) -> None:
    counts = [run_ranks(count_reductions, 2, model, tokens)[0] for tokens in (16, 10_000)]
    assert counts[0][0] > counts[1][0]
    for _, reduced, size in counts:
        assert reduced == size


def count_scattered(rank: int, chunk_tokens: int) -> tuple[int, list[int]]:
    """Run an FSDP2 step; return the number of chunks, and the elements of each reduction."""
    gangs = open_gangs(sharded=True)
    module = wrap(create_model(CLIP), CLIP, gangs, "fsdp")
    step = GradCache(module, loss_of(), chunk_tokens=chunk_tokens, activation_budget=0)
    query, document, info = rank_batch(CLIP, rank, 6, 0)
    value = step(query, document, rows=info)
    reduced = []
    original = dist.reduce_scatter_tensor

    def counting(*args: Any, **kwargs: Any) -> Any:
        reduced.append(kwargs["input"].numel())
        return original(*args, **kwargs)

    dist.reduce_scatter_tensor = counting
    value.backward()
    return step.stats.num_chunks, sorted(reduced)


def test_each_layer_is_reduced_once_whatever_the_number_of_chunks() -> None:
    (many, reduced), (few, expected) = (run_ranks(count_scattered, 2, tokens)[0] for tokens in (16, 10_000))
    assert many > few
    assert reduced == expected
    # All parameters, with padding to a multiple of the number of ranks.
    size = sum(p.numel() for p in create_model(CLIP).parameters())
    assert size <= sum(reduced) < 1.1 * size

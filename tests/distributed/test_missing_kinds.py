"""A rank without rows of a kind that others have trains exactly: it runs a blank row, which contributes nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.gradcache import GradCache
from vembed_fs2.losses import RowInfo

from .spawn import run_ranks
from .steps import (
    CLIP,
    create_model,
    full_gradients,
    images,
    loss_of,
    open_gangs,
    reference_gradient,
    relative_error,
    texts,
    wrap,
)
from .tiny.clip import texts_with_images
from .tiny.siglip import create_config, patches

ROWS = 6

# Without dropout: a blank row draws random numbers that the reference does not draw.
PLAIN_CLIP = replace(CLIP, text=replace(CLIP.text, attn_dropout_p=0.0), vision=replace(CLIP.vision, attn_dropout_p=0.0))

SIGLIP = create_config(naflex=True)
assert SIGLIP.text is not None
assert SIGLIP.vision is not None
PLAIN_SIGLIP = replace(
    SIGLIP, text=replace(SIGLIP.text, attn_dropout_p=0.0), vision=replace(SIGLIP.vision, attn_dropout_p=0.0)
)

RANKS = {
    "texts; texts and images": (PLAIN_CLIP, ("texts", "texts"), ("texts", "images")),
    "texts; rows of both": (PLAIN_CLIP, ("texts", "texts"), ("texts", "both")),
    "images; texts": (PLAIN_CLIP, ("images", "images"), ("texts", "texts")),
    "rows of both; texts": (PLAIN_CLIP, ("both", "both"), ("texts", "texts")),
    "texts; patches": (PLAIN_SIGLIP, ("texts", "texts"), ("patches", "patches")),
}
"""The model, and for each rank what its queries and its documents hold."""

CASES = list(product(RANKS, [0, "all"], ["last", "every_chunk"]))

MAKE = {"texts": texts, "images": images, "both": texts_with_images, "patches": patches}


def batch_of(rank: int, kinds: tuple[str, str]) -> tuple[EncoderBatch, EncoderBatch, RowInfo]:
    query, document = (MAKE[kind](ROWS, 50 + 10 * rank + i) for i, kind in enumerate(kinds))
    info = RowInfo.distinct(ROWS, ROWS)
    offset = 1000 * (rank + 1)
    return query, document, replace(info, query_ids=info.query_ids + offset, document_ids=info.document_ids + offset)


def run(rank: int, kind: str, cases: list[tuple[Any, ...]]) -> list[float]:
    gangs = open_gangs(sharded=kind == "fsdp")
    gather = RowGather(gangs.dp.as_process_group())

    errors = []
    for name, budget, grad_sync in cases:
        config, *kinds = RANKS[name]
        module = wrap(create_model(config), config, gangs, kind)
        step = GradCache(module, loss_of(gather), chunk_tokens=30, activation_budget=budget, grad_sync=grad_sync)
        query, document, info = batch_of(rank, kinds[rank])
        step(query, document, rows=info).backward()

        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(gangs.dp.size)
        expected = reference_gradient(config, [[batch_of(r, kinds[r]) for r in range(2)]], 30, [0, 0])
        errors.append(relative_error(full_gradients(module), expected))
    return errors


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_may_lack_a_kind_of_rows_that_others_have(kind: str) -> None:
    cases = [case for case in CASES if kind == "fsdp" or case[2] == "last"]
    for errors in run_ranks(run, 2, kind, cases):
        worst = max(zip(errors, cases), key=lambda pair: pair[0])
        assert worst[0] <= 1e-5, worst

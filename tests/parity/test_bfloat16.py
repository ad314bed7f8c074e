"""All families with weights in bfloat16: close to float32, float32 at the end, whatever else is encoded."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tests.distributed.families import load_cases
from tests.distributed.steps import create_model
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.inference.encoder import Encoder
from vembed_fs2.inference.vectors import VectorOptions

CASES, _ = load_cases()


@cache
def models(name: str) -> tuple[EmbeddingModel, EmbeddingModel]:
    model = create_model(CASES[name].config).eval()
    return model, copy.deepcopy(model).to(torch.bfloat16)


def encode(model: EmbeddingModel, batch: EncoderBatch, *, chunk_tokens: int | None = None) -> list[Tensor]:
    """The vectors of each row, as users get them. *Shape:* ``[L, D]`` each, where L is 1 unless there are several."""
    finish = VectorOptions.of(model, precision="float32").finish
    rows: dict[int, Tensor] = {}
    for positions, embeddings in Encoder(model, chunk_tokens=chunk_tokens).encode_batch(batch):
        values, mask = finish(embeddings)[:2]
        for i, position in enumerate(positions):
            rows[position] = values[i : i + 1] if mask is None else values[i][mask[i]]
    return [rows[i] for i in range(batch.num_rows)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_close_to_float32(name: str) -> None:
    plain, half = models(name)
    for make in (CASES[name].query, CASES[name].document):
        batch = make(6, 0)
        for expected, got in zip(encode(plain, batch), encode(half, batch)):
            assert got.dtype == torch.float32
            assert cosine_similarity(got, expected).min() >= 0.99


@pytest.mark.parametrize("name", CASES)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    """The order of sums differs, and so does the rounding, but nothing more than that."""
    _, half = models(name)
    batch = CASES[name].query(6, 0)
    for together, alone in zip(encode(half, batch), encode(half, batch, chunk_tokens=1)):
        assert cosine_similarity(together, alone).min() >= 0.999

"""What an objective outside the package learns is trained with a gradient cache, on one process and on two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.learned import LearnedPart
from vembed_fs2.embedding.model import Embeddings, EncoderBatch
from vembed_fs2.gradcache import GradCache
from vembed_fs2.losses import InfoNCE, InfoNCEConfig, LossInput, LossOutput, Matryoshka, Objective, RowInfo
from vembed_fs2.models.bert import BertConfig

from .spawn import run_ranks
from .steps import BERT, create_model, full_gradients, open_gangs, rank_batch, relative_error, wrap

NAME: Final = "dimension_weights"


class Weighted(Objective):
    """InfoNCE that learns how much each dimension counts."""

    def __init__(self, gather: RowGather | None = None) -> None:
        self._inner = InfoNCE(InfoNCEConfig(temperature=0.2, learn_temperature=True), gather)

    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        weights = LearnedPart(name=NAME, shape=(embedding_dim,), mean=1.0, std=0.1, per_dimension=True)
        return [*self._inner.learned_parts(embedding_dim, teacher_dim), weights]

    def compute(self, inputs: LossInput) -> LossOutput:
        weights = inputs.get_part(NAME)
        return self._inner.compute(replace(inputs, query=inputs.query * weights, document=inputs.document * weights))


def create(is_nested: bool, gather: RowGather | None = None) -> Objective:
    return Matryoshka(Weighted(gather), [6, BERT.model_dim]) if is_nested else Weighted(gather)


def config_of(objective: Objective) -> BertConfig:
    parts = [part for part in objective.learned_parts(BERT.model_dim) if part.name == NAME]
    return replace(BERT, dropout_p=0.0, attn_dropout_p=0.0, learned=parts)


def loss_of(objective: Objective) -> Callable[..., Tensor]:
    def compute(query: Embeddings, document: Embeddings, rows: RowInfo) -> Tensor:
        return objective(query.values, document.values, rows, **query.parts).loss

    return compute


def cached(module: Any, objective: Objective, rank: int) -> dict[str, Tensor]:
    query, document, rows = rank_batch(BERT, rank, 5 - rank, 0)
    step = GradCache(module, loss_of(objective), chunk_tokens=40, activation_budget=0)
    step(query, document, rows=rows).backward()
    return full_gradients(module)


def plain(is_nested: bool, num_ranks: int) -> dict[str, Tensor]:
    """The gradient of one process and one graph for the rows of all ranks."""
    objective = create(is_nested)
    model = create_model(config_of(objective))
    batches = [rank_batch(BERT, rank, 5 - rank, 0) for rank in range(num_ranks)]
    sizes = [query.num_rows for query, _, _ in batches]

    def join(parts: Sequence[Tensor]) -> Tensor:
        """All positives come before all negatives."""
        return torch.cat([p[:n] for p, n in zip(parts, sizes)] + [p[n:] for p, n in zip(parts, sizes)])

    rows = RowInfo(
        torch.cat([info.query_ids for _, _, info in batches]),
        join([info.document_ids for _, _, info in batches]),
        torch.cat([info.labels for _, _, info in batches]),
    )
    query = model(EncoderBatch.concat([query for query, _, _ in batches]))
    documents = [model(document) for _, document, _ in batches]
    document = documents[0]._replace(values=join([d.values for d in documents]))
    loss_of(objective)(query, document, rows).backward()
    return full_gradients(model)


@pytest.mark.parametrize("is_nested", [False, True], ids=["alone", "nested"])
def test_one_process_with_a_gradient_cache_gets_the_gradient_of_a_plain_step(is_nested: bool) -> None:
    objective = create(is_nested)
    got, expected = cached(create_model(config_of(objective)), objective, 0), plain(is_nested, 1)
    assert {NAME, "logit_scale"} <= expected.keys()
    assert float(expected[NAME].norm()) > 0.0
    assert relative_error(got, expected) < 1e-5


def errors_on_rank(rank: int, kind: str) -> list[float]:
    gangs = open_gangs(sharded=kind == "fsdp")
    errors = []
    for is_nested in (False, True):
        objective = create(is_nested, RowGather(gangs.dp.as_process_group()))
        config = config_of(objective)
        got = cached(wrap(create_model(config), config, gangs, kind), objective, rank)
        # DDP and FSDP2 give the mean over ranks.
        got = {name: grad * gangs.dp.size for name, grad in got.items()}
        expected = plain(is_nested, 2)
        errors += [relative_error(got, expected), relative_error({NAME: got[NAME]}, {NAME: expected[NAME]})]
    return errors


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_get_the_gradient_of_one(kind: str) -> None:
    for errors in run_ranks(errors_on_rank, 2, kind):
        assert max(errors) < 1e-5

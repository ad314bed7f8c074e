"""An evaluation on a gang gives the results of one process, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from vembed_fs2.data.example import Item
from vembed_fs2.distributed import RowGather
from vembed_fs2.errors import DataError
from vembed_fs2.evaluation.retrieval import evaluate_embedder
from vembed_fs2.evaluation.task import NOTHING_RELEVANT, RetrievalTask

from .spawn import run_ranks

NUM_QUERIES, NUM_DOCUMENTS = 7, 12


class Numbers:
    """An embedder of numbers, with a vector or several for each; it counts what it encodes."""

    def __init__(self, *, several: bool) -> None:
        self._several = several
        self.num_encoded = 0

    def encode_document(self, inputs: Any, *, batch_size: int | None = None) -> Any:
        self.num_encoded += len(inputs)
        rows = [self._vectors(int(item.text)) for item in inputs]
        if self._several:
            return rows
        return np.stack([row[0] for row in rows]) if rows else np.empty((0, 4), dtype=np.float32)

    def encode_query(self, inputs: Any, *, batch_size: int | None = None) -> Any:
        return self.encode_document(inputs, batch_size=batch_size)

    def _vectors(self, number: int) -> Any:
        draw = np.random.default_rng(number % 5)  # Some are equal, so that ties are broken.
        return draw.normal(size=(1 + number % 3, 4)).astype(np.float32)


def items(size: int, start: int = 0) -> list[Item]:
    return [Item(text=str(start + i)) for i in range(size)]


def make_tasks() -> dict[str, RetrievalTask]:
    documents = items(NUM_DOCUMENTS)
    relevant = [{i: 1.0, (i * 5) % NUM_DOCUMENTS: 2.0} for i in range(NUM_QUERIES)]
    partners = [{(i + 6) % NUM_DOCUMENTS: 1.0} for i in range(NUM_DOCUMENTS)]
    one_relevant: list[dict[int, float]] = [{} for _ in range(NUM_QUERIES)]
    one_relevant[4] = {3: 1.0}
    return {
        "queries": RetrievalTask(items(NUM_QUERIES, 100), documents, relevant),
        "among themselves": RetrievalTask(documents, documents, partners, exclude_self=True),
        "one relevant": RetrievalTask(items(NUM_QUERIES, 100), documents, one_relevant),
        "fewer than ranks": RetrievalTask(items(1, 100), items(2), [{1: 1.0}]),
    }


def open_gang() -> RowGather:
    dist.init_process_group("gloo")
    return RowGather(dist.group.WORLD)


def evaluate_all(rank: int, gather: RowGather | None = None) -> dict[str, tuple[dict[str, float], int]]:
    gather = gather or open_gang()
    found = {}
    for several in (False, True):
        for name, task in make_tasks().items():
            embedder = Numbers(several=several)
            results = evaluate_embedder(embedder, task, ks=[1, 3], gather=gather)
            found[f"{name}, {several}"] = (results, embedder.num_encoded)
    return found


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_results_are_those_of_one_process(num_ranks: int) -> None:
    alone = evaluate_all(0, RowGather())
    ranks = run_ranks(evaluate_all, num_ranks)

    for case, (results, num_encoded) in alone.items():
        assert all(found[case][0] == results for found in ranks), case
        assert sum(found[case][1] for found in ranks) == num_encoded, case
        assert max(found[case][1] for found in ranks) <= num_encoded / num_ranks + 2, case
    assert 0 < alone["queries, False"][0]["mrr"] < 1


def find_nothing(rank: int) -> str:
    task = RetrievalTask(items(3), items(3), [{}, {}, {}])
    with pytest.raises(DataError) as caught:
        evaluate_embedder(Numbers(several=False), task, gather=open_gang())
    return str(caught.value)


def test_a_task_without_anything_relevant_is_an_error_on_all_ranks() -> None:
    assert run_ranks(find_nothing, 2) == [NOTHING_RELEVANT] * 2


def test_one_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    torch.manual_seed(0)
    results = evaluate_embedder(Numbers(several=True), make_tasks()["queries"])
    assert results["num_documents"] == NUM_DOCUMENTS

"""Validation over ranks whose shares differ in number, length and kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fairseq2.metrics import MetricBag
from fairseq2.metrics.aggregation import Sum
from PIL import Image
from torch.distributed.fsdp import fully_shard

from vembed_fs2 import Embedder
from vembed_fs2.data.example import Item
from vembed_fs2.demo.images import TEMPLATES, caption, write_model_folder
from vembed_fs2.distributed import RowGather
from vembed_fs2.evaluation.retrieval import evaluate_embedder
from vembed_fs2.evaluation.task import RetrievalTask
from vembed_fs2.recipes.train.valid import VALID_METRICS, RetrievalEvalUnit, ValidReader

from .spawn import run_ranks
from .steps import open_gangs

Report = tuple[list[list[int]], dict[str, float], int]


def task() -> RetrievalTask:
    """Nine queries and a corpus of which most texts, with a wide range of lengths, fall to one rank."""
    queries = [Item(text=caption(i, TEMPLATES[i % 3])) for i in range(9)]
    # No two are the same: rounding would decide which comes first.
    corpus = [Item(text=caption(i % 10, TEMPLATES[(0, 2)[i % 2] if i < 10 else 1])) for i in range(13)]
    corpus += [Item(images=(Image.new("RGB", (20, 20), (40 * i, 9, 90)),)) for i in range(3)]
    corpus.append(Item(text="seven", images=(Image.new("RGB", (20, 20), (1, 200, 90)),)))
    return RetrievalTask(queries=queries, corpus=corpus, relevant=[{i: 1.0} for i in range(9)])


def validate(rank: int, folder: str, sharded: bool) -> Report:
    """*Returns:* the kinds of each batch, the metrics, and the number of inputs that other ranks read."""
    gangs = open_gangs(sharded=False) if sharded else None
    embedder = Embedder.load(Path(folder), device="cpu")
    model = embedder.model
    if sharded:
        for stack in model.layer_stacks():
            for layer in stack:
                fully_shard(layer)
        fully_shard(model)
    gather = RowGather(dist.group.WORLD if sharded else None)
    reader = ValidReader(task(), embedder.processor, batch_size=3, chunk_tokens=12, gather=gather)
    unit = RetrievalEvalUnit(model, task(), gangs.dp if gangs is not None else _Alone())  # type: ignore[arg-type]
    bag = MetricBag(device=torch.device("cpu"))
    unit.prepare_metric_bag(bag)
    kinds: list[list[int]] = []
    seen: dict[str, set[int]] = {"query": set(), "document": set()}
    for batches in reader:
        (batch,) = batches
        assert batch.inputs.num_rows == batch.indices.numel() <= 3
        kinds.append(sorted(set(batch.inputs.profile().kinds)))
        seen[batch.role] |= set(batch.indices.tolist())
        with torch.no_grad():
            unit.process_batch(batch, bag)
    unit.finalize(bag)
    metrics = {name: float(bag.get(name, Sum).compute()) for name in VALID_METRICS}
    return kinds, metrics, 9 + 17 - len(seen["query"]) - len(seen["document"])


class _Alone:
    rank, size = 0, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(path)
    return str(path)


def test_sharded_models_run_the_same_batches_on_all_ranks_and_give_the_same_metrics(folder: str) -> None:
    _, expected, missing = validate(0, folder, False)
    assert missing == 0
    first, second = run_ranks(validate, 2, folder, True)
    assert first[0] == second[0]
    assert all(len(kinds) == 1 for kinds in first[0])
    assert first[2] > 0
    assert first[1] == pytest.approx(expected)


def test_rows_that_are_searched_among_themselves_are_encoded_once(folder: str) -> None:
    items = [Item(text=caption(i % 3, TEMPLATES[i // 3])) for i in range(9)]
    relevant = [{j: 1.0 for j in range(9) if j % 3 == i % 3} for i in range(9)]
    own = RetrievalTask(items, items, relevant, exclude_self=True)
    embedder = Embedder.load(Path(folder), device="cpu")
    unit, bag = RetrievalEvalUnit(embedder.model, own, _Alone()), MetricBag(device=torch.device("cpu"))  # type: ignore[arg-type]
    unit.prepare_metric_bag(bag)
    seen = []
    for (batch,) in ValidReader(own, embedder.processor, batch_size=4, chunk_tokens=100, gather=RowGather()):
        seen += [(batch.role, index) for index in batch.indices.tolist()]
        with torch.no_grad():
            unit.process_batch(batch, bag)
    unit.finalize(bag)
    assert sorted(seen) == [("document", index) for index in range(9)]
    expected = evaluate_embedder(embedder, own)
    assert {name: float(bag.get(name, Sum).compute()) for name in VALID_METRICS} == pytest.approx(
        {name: expected[name] for name in VALID_METRICS}
    )

"""Models of all families through the cached, distributed step, against the plain step of one process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Final

import pytest
import torch
from fairseq2.gang import Gangs, ProcessGroupGang, create_fsdp_gangs, create_parallel_gangs
from torch import Tensor

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.model import EmbeddingModel, Embeddings, EncoderBatch
from vembed_fs2.errors import ConfigError
from vembed_fs2.gradcache import GradCache, plan_chunks
from vembed_fs2.gradcache.planner import Chunk, match_counts
from vembed_fs2.losses import InfoNCE, InfoNCEConfig, RowInfo

from . import tiny
from .exactness import encode_all, join, own_shard
from .steps import BOTH, CPU, create_model, full_gradients, wrap

MODES: Final = ("DDP x2", "FSDP2 x2", "TP 2")

ROWS: Final = (7, 5)
"""The queries of each rank; each has a positive and a negative."""


@dataclass(frozen=True)
class Case:
    """A small model, and what it reads."""

    family: str
    config: Any
    query: Callable[[int, int], EncoderBatch]
    """Makes the queries, of a number of rows and a seed."""

    document: Callable[[int, int], EncoderBatch]
    """Makes the documents, of a number of rows and a seed."""

    tensor_parallel: bool = True
    """Whether the model can be split over tensor parallel ranks; if not, that must be refused."""


def load_cases() -> tuple[dict[str, Case], dict[str, str]]:
    """All cases, and the modules that cannot be imported, with the reason: one must not hide the others."""
    cases: dict[str, Case] = {}
    broken: dict[str, str] = {}
    for module in sorted(m.name for m in iter_modules(tiny.__path__)):
        try:
            cases |= {f"{module}: {name}": case for name, case in _import(module).items()}
        except Exception:
            broken[module] = traceback.format_exc()
    return cases, broken


def load_case(name: str) -> Case:
    module, _, own_name = name.partition(": ")
    return _import(module)[own_name]


def _import(module: str) -> dict[str, Case]:
    cases: dict[str, Case] = import_module(f"{tiny.__name__}.{module}").CASES
    return cases


def errors_on_rank(rank: int, jobs: Sequence[tuple[str, str]]) -> list[float | str]:
    """For each mode and case, the relative error on this rank, or what was raised.

    What fails must fail on all ranks alike; otherwise a collective runs out of time, and all later jobs fail.
    """
    root = ProcessGroupGang.create_default_process_group(CPU, timeout=timedelta(minutes=2))
    plain = create_parallel_gangs(root)
    gangs = {"DDP x2": plain, "FSDP2 x2": create_fsdp_gangs(plain), "TP 2": create_parallel_gangs(root, tp_size=2)}
    results: list[float | str] = []
    for mode, name in jobs:
        try:
            case = load_case(name)
            if mode == "TP 2":
                results.append(_tensor_parallel_error(case, gangs[mode]))
            else:
                results.append(_data_parallel_error(case, mode, gangs[mode]))
        except Exception:
            results.append(traceback.format_exc())
    return results


def _data_parallel_error(case: Case, mode: str, gangs: Gangs) -> float:
    model = create_model(case.config, checkpointing=True)
    module = wrap(model, case.config, gangs, "ddp" if mode == "DDP x2" else "fsdp")
    gather = RowGather(gangs.dp.as_process_group())
    got = _cached_gradient(case, module, _Loss(model, gather), gangs.dp.rank)
    got = {name: grad * gangs.dp.size for name, grad in got.items()}  # The trainer undoes the averaging like this.
    whole = create_model(case.config)
    expected = _plain_gradient(case, whole, gangs.dp.size, equal_counts=mode == "FSDP2 x2")
    return _relative_error(got, expected)


def _tensor_parallel_error(case: Case, gangs: Gangs) -> float:
    if not case.tensor_parallel:
        with pytest.raises(ConfigError, match="tensor parallel"):
            create_model(case.config, gangs)
        return 0.0
    # Each rank draws the dropout of its own heads: no single process draws the same.
    whole, module = create_model(case.config).eval(), create_model(case.config, gangs, checkpointing=True).eval()
    _copy_shards(whole, module, gangs.tp.rank)
    batch = EncoderBatch.concat(_rank_rows(case, 0)[:2])
    with torch.no_grad():
        outputs = [m(batch).values for m in (whole, module)]
    got = _cached_gradient(case, module, _Loss(module), 0)
    expected = _plain_gradient(case, whole, 1)
    shards = {name: own_shard(grad, got[name].shape, gangs.tp.rank) for name, grad in expected.items() if name in got}
    embedding_error = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    return max(embedding_error, _relative_error(got, expected | shards))


class _Loss:
    """InfoNCE, with the temperature of the model where it has one."""

    def __init__(self, model: EmbeddingModel, gather: RowGather | None = None) -> None:
        config = InfoNCEConfig(
            temperature=0.2,
            learn_temperature=model.logit_scale is not None,
            directions=BOTH,
            similarity="maxsim" if model.similarity == "maxsim" else "cosine",
        )
        self._loss = InfoNCE(config, gather)

    def __call__(self, query: Embeddings, document: Embeddings, rows: RowInfo) -> Tensor:
        masks = {"query_mask": query.mask, "document_mask": document.mask}
        return self._loss(query.values, document.values, rows, query.logit_scale, **masks).loss


def _rank_rows(case: Case, rank: int) -> tuple[EncoderBatch, EncoderBatch, RowInfo]:
    rows = ROWS[rank]
    info = RowInfo.distinct(rows, 2 * rows)
    offset = 10_000 * (rank + 1)
    ids = {"query_ids": info.query_ids + offset, "document_ids": info.document_ids + offset}
    labels = torch.tensor([i % 3 for i in range(rows)])  # 0: no label
    return case.query(rows, 10 * rank), case.document(2 * rows, 10 * rank + 5), replace(info, **ids, labels=labels)


def _chunk_tokens(case: Case) -> int:
    """About a fifth of the tokens of the first rank."""
    costs = EncoderBatch.concat(_rank_rows(case, 0)[:2]).profile().costs()
    return max(sum(costs) // 5, max(costs))


def _third_of_graphs(case: Case) -> int:
    """A third of what the graphs of the first rank's step hold: more than the first chunk is kept, and not all."""
    model = create_model(case.config, checkpointing=True)
    step = GradCache(model, _Loss(model), chunk_tokens=_chunk_tokens(case), activation_budget=0)
    query, document, rows = _rank_rows(case, 0)
    step(query, document, rows=rows)
    return step.stats.graph_bytes // 3


def _cached_gradient(case: Case, module: Any, loss: _Loss, rank: int) -> dict[str, Tensor]:
    budget = _third_of_graphs(case)
    step = GradCache(module, loss, chunk_tokens=_chunk_tokens(case), activation_budget=budget)
    query, document, rows = _rank_rows(case, rank)
    torch.manual_seed(100 + rank)
    step(query, document, rows=rows).backward()
    assert 1 < step.stats.num_kept < step.stats.num_chunks, step.stats
    return full_gradients(module)


def _plain_gradient(
    case: Case, model: EmbeddingModel, world_size: int, *, equal_counts: bool = False
) -> dict[str, Tensor]:
    """One process, one graph, no cache; rows in the chunks, and with the random numbers, of each rank.

    :param equal_counts: whether all ranks run the same number of chunks, as with FSDP2.
    """
    ranks = [_rank_rows(case, rank) for rank in range(world_size)]
    batches = [EncoderBatch.concat([query, document]) for query, document, _ in ranks]
    outputs = []
    for rank, (batch, chunks) in enumerate(zip(batches, _plans(case, batches, equal_counts))):
        torch.manual_seed(100 + rank)
        outputs.append(encode_all(model, batch, chunks))
    query, document, rows = join(outputs, [info for _, _, info in ranks], torch.float32)
    _Loss(model)(query, document, rows).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    unused = trained - grads.keys() - model.learned.keys()
    assert not unused, f"parameters without a gradient, an error under DDP: {sorted(unused)}"
    return grads


def _plans(case: Case, batches: Sequence[EncoderBatch], equal_counts: bool) -> Iterator[list[Chunk]]:
    """The chunks of each rank in the engine's order: the first of each kind, then the rest."""
    plans = [plan_chunks(b.profile(), _chunk_tokens(case)) for b in batches]
    if equal_counts:
        counts = {k: max(sum(c.kind == k for c in plan) for plan in plans) for k in {c.kind for c in plans[0]}}
        plans = [match_counts(plan, counts, b.profile()) for plan, b in zip(plans, batches)]
    for plan in plans:
        kinds = [c.kind for c in plan]
        yield sorted(plan, key=lambda c: plan.index(c) != kinds.index(c.kind))


def _copy_shards(source: EmbeddingModel, target: EmbeddingModel, rank: int) -> None:
    tensors = ([*model.parameters(), *model.buffers()] for model in (source, target))
    with torch.no_grad():
        for whole, part in zip(*tensors, strict=True):
            part.copy_(own_shard(whole, part.shape, rank))


def _relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The L2 distance over the length. A gradient that the plain step has not must be zero."""
    assert expected.keys() <= got.keys(), expected.keys() - got.keys()
    pairs = [(grad, expected.get(name, torch.zeros_like(grad))) for name, grad in got.items()]
    difference = torch.cat([(g - e).double().reshape(-1) for g, e in pairs])
    return float(difference.norm() / torch.cat([e.double().reshape(-1) for _, e in pairs]).norm())

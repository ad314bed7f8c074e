"""The gradient of a cached, distributed step against that of the plain step, over all that changes how it is computed.

``python -m tests.distributed.exactness`` runs a case for each cell of the table
of ``docs/exactness.md`` and prints it; with ``--full``, all combinations.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Final, NamedTuple

import torch
from allpairspy import AllPairs
from fairseq2.gang import Gangs, ProcessGroupGang, create_fake_gangs, create_parallel_gangs
from torch import Tensor

from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.inputs import Kind
from vembed_fs2.embedding.model import EmbeddingModel, EmbeddingModelConfig, Embeddings, EncoderBatch, HeadConfig
from vembed_fs2.gradcache import GradCache, plan_chunks
from vembed_fs2.gradcache.planner import match_counts
from vembed_fs2.gradcache.replay import SavedBytes
from vembed_fs2.losses import Objective, RowInfo, create_loss
from vembed_fs2.losses.matryoshka import Matryoshka
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.recipes.train.sides import complete_queries

from . import mixed
from .objectives import OBJECTIVES
from .spawn import run_ranks
from .steps import CPU, create_model, full_gradients, open_gangs, texts, wrap

CHUNK_TOKENS: Final = 40

TEACHER_DIM: Final = 10

DIM: Final = 16


class Case(NamedTuple):
    """What is varied."""

    objective: str
    matryoshka: bool
    parallel: str
    dropout: float
    checkpointing: bool
    kept: str
    uneven: bool
    dtype: str
    accumulation: int
    scale: float


LEVELS: Final[dict[str, Sequence[Any]]] = {
    "objective": list(OBJECTIVES),
    "matryoshka": [False, True],
    "parallel": ["1 process", "DDP x2", "FSDP2 x2", "TP 2"],
    "dropout": [0.0, 0.1],
    "checkpointing": [False, True],
    "kept": ["0", "half", "all"],
    "uneven": [False, True],
    "dtype": ["fp32", "bf16"],
    "accumulation": [1, 2],
    "scale": [1.0, 1024.0],
}


def tolerance(case: Case) -> float:
    return OBJECTIVES[case.objective].tolerance[case.dtype]


def is_possible(values: Sequence[Any]) -> bool:
    """Whether the values, of the first factors, can be combined."""
    case = dict(zip(Case._fields, values))
    # Each tensor parallel rank draws the dropout of its own attention heads: no single process draws the same.
    return not (case.get("parallel") == "TP 2" and case.get("dropout", 0.0) > 0.0)


def pairwise() -> list[Case]:
    """Cases in which every two levels of different factors meet."""
    return [Case(*values) for values in AllPairs(list(LEVELS.values()), filter_func=is_possible)]


def cells() -> list[Case]:
    """A case for each cell of the table, with random levels of all that the table does not show."""
    chosen = random.Random(0)
    shown = ("objective", "matryoshka", "parallel", "dtype")
    cases = []
    for values in product(*(LEVELS[name] for name in shown)):
        fixed = dict(zip(shown, values))
        while not is_possible(levels := [fixed.get(n, chosen.choice(LEVELS[n])) for n in LEVELS]):
            pass
        cases.append(Case(*levels))
    return cases


def full() -> list[Case]:
    """All combinations."""
    return [Case(*values) for values in product(*LEVELS.values()) if is_possible(values)]


def model_config(case: Case) -> EmbeddingModelConfig:
    options = OBJECTIVES[case.objective]
    if options.mixed:
        return replace(mixed.CONFIG, attn_dropout_p=case.dropout)
    return BertConfig(
        model_dim=DIM, max_seq_len=32, vocab_size=50, num_layers=2, num_attn_heads=2, ffn_inner_dim=24,
        dropout_p=case.dropout, attn_dropout_p=case.dropout, logit_scale_init=2.0, logit_bias_init=-1.0,
        teacher_dim=TEACHER_DIM if options.projection else None,
        head=HeadConfig(pooling="none" if options.multi_vector else "mean"),
    )  # fmt: skip


def create_objective(case: Case, gather: RowGather | None = None) -> Objective:
    options = OBJECTIVES[case.objective]
    objective = create_loss(options.name, options.config, gather)
    # Unordered, with weights, one dimension full: what pairs dimensions and weights wrongly shows.
    return Matryoshka(objective, [4, DIM, 9], [0.5, 1.0, 2.0]) if case.matryoshka else objective


def num_rows(case: Case, rank: int) -> int:
    return 7 - 2 * rank if case.uneven else 6


def rank_rows(case: Case, rank: int, number: int) -> tuple[EncoderBatch | None, EncoderBatch, RowInfo]:
    """One rank's rows: queries, positives and a negative for each, some of one class, some copies over ranks.

    Rows with a label only have no query: it is their document.
    """
    rows, base = num_rows(case, rank), 1000 * number + 10 * rank
    g = torch.Generator().manual_seed(base)
    query, *documents = (encoder_batch(case, rank, base + i) for i in range(3))
    document = EncoderBatch.concat(documents)
    info = RowInfo.distinct(rows, 2 * rows)
    offset = 10_000 * (rank + 1)
    document_ids = info.document_ids + offset
    document_ids[0] = 7  # The first positive of every rank is the same document.
    facts: dict[str, Tensor] = {
        "query_ids": info.query_ids + offset,
        "document_ids": document_ids,
        "labels": torch.tensor([i % 3 for i in range(rows)]),  # 0: no label
        # Of few values, so that some are the same.
        "scores": torch.randint(5, (2 * rows,), generator=g) / 4.0,
        "teacher_query": torch.randn(rows, TEACHER_DIM, generator=g),
        "teacher_document": torch.randn(2 * rows, TEACHER_DIM, generator=g),
    }
    info = replace(info, **facts)

    one_sided = OBJECTIVES[case.objective].one_sided
    if not one_sided:
        return query, document, info

    alone = torch.arange(rows) % 2 > 0 if one_sided == "some" else torch.ones(rows, dtype=torch.bool)
    info.one_sided = alone
    info.query_ids = torch.where(alone, info.document_ids[:rows], info.query_ids)
    info.teacher_query = None
    info.teacher_document = None
    pairs = [i for i in range(rows) if not alone[i]]
    return query.select(pairs) if pairs else None, document, info


def encoder_batch(case: Case, rank: int, seed: int) -> EncoderBatch:
    rows = num_rows(case, rank)
    if OBJECTIVES[case.objective].mixed:
        # If ranks differ, the second one has no images at all.
        return mixed.rows(rows, seed, has_images=rank == 0 or not case.uneven)
    return texts(rows, seed)


def together(query: EncoderBatch | None, document: EncoderBatch) -> EncoderBatch:
    return document if query is None else EncoderBatch.concat([query, document])


def complete(encoded: Embeddings, info: RowInfo) -> Embeddings:
    """All queries, then all documents of a rank, from what was encoded."""
    if info.one_sided is None:
        return encoded
    alone = info.one_sided.tolist()
    first = len(alone) - sum(alone)
    places = [first + i if alone[i] else i - sum(alone[:i]) for i in range(len(alone))]
    index = torch.tensor(places + list(range(first, encoded.values.size(0))))
    return encoded._replace(values=encoded.values[index])


def compute(objective: Objective, query: Embeddings, document: Embeddings, rows: RowInfo) -> Tensor:
    return objective(
        query.values, document.values, rows, query_mask=query.mask, document_mask=document.mask, **query.parts
    ).loss


def run_case(case: Case, rank: int, gangs: Gangs) -> dict[str, Tensor]:
    """The gradient of the cached step, as fairseq2's trainer leaves it."""
    config = model_config(case)
    module: Any = create_model(config, checkpointing=case.checkpointing)
    if case.parallel == "TP 2":
        whole, module = module, create_model(config, gangs, checkpointing=case.checkpointing)
        copy_shards(whole, module, gangs.tp.rank)
    elif case.parallel != "1 process":
        module = wrap(module, config, gangs, "ddp" if case.parallel == "DDP x2" else "fsdp")
    dp = gangs.dp
    objective = create_objective(case, RowGather(dp.as_process_group()) if dp.size > 1 else None)
    budget: int | str = "all" if case.kept == "all" else 0
    if case.kept == "half":
        budget = half_of_graphs(case)
    torch.manual_seed(100 + dp.rank)

    def loss(*roles: Embeddings, rows: RowInfo) -> Tensor:
        *query, document = roles
        return compute(objective, complete_queries(query[0] if query else None, document, rows), document, rows)

    step = GradCache(module, loss, chunk_tokens=CHUNK_TOKENS, activation_budget=budget)
    for number in range(case.accumulation):
        query, document, rows = rank_rows(case, dp.rank, number)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
            value = step(*([] if query is None else [query]), document, rows=rows)
        (value * case.scale).backward()
    # What the trainer does: undo the averaging over ranks and the loss scale.
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(dp.size / case.scale)
    return full_gradients(module)


def half_of_graphs(case: Case) -> int:
    """Half of what the graphs of a step hold, beyond the first, which is kept in any case."""
    model = create_model(model_config(case), checkpointing=case.checkpointing)
    query, document, _ = rank_rows(case, 0, 0)
    saved = SavedBytes()
    with saved.measuring(), torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
        model(together(query, document))
    return saved.total // 2


def copy_shards(source: EmbeddingModel, target: EmbeddingModel, rank: int) -> None:
    with torch.no_grad():
        for whole, part in zip(source.parameters(), target.parameters(), strict=True):
            part.copy_(own_shard(whole, part.shape, rank))


def own_shard(tensor: Tensor, shape: Sequence[int], rank: int) -> Tensor:
    for dim, (whole, part) in enumerate(zip(tensor.shape, shape)):
        if whole != part:
            return tensor.narrow(dim, rank * part, part)
    return tensor


def reference(case: Case, world_size: int) -> dict[str, Tensor]:
    """The gradient of the plain loss on the concatenated batch: one process, one graph, no cache; in float64, or in
    bfloat16 autocast.

    Rows are encoded in the same chunks and with the same random numbers as each
    rank encodes them, so that dropout masks are the same.
    """
    dtype = torch.float64 if case.dtype == "fp32" else torch.float32
    model = create_model(model_config(case)).to(dtype)
    states = []
    for rank in range(world_size):
        torch.manual_seed(100 + rank)
        states.append(torch.get_rng_state())
    for number in range(case.accumulation):
        ranks = [rank_rows(case, rank, number) for rank in range(world_size)]
        batches = [together(q, d) for q, d, _ in ranks]
        plans = plan_all(case, batches)
        parts: list[Embeddings] = []
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
            for rank, (batch, plan) in enumerate(zip(batches, plans)):
                torch.set_rng_state(states[rank])
                parts.append(complete(encode_all(model, batch, plan), ranks[rank][2]))
                states[rank] = torch.get_rng_state()
            query, document, rows = join(parts, [r for _, _, r in ranks], dtype)
            value = compute(create_objective(case), query, document, rows)
        value.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def plan_all(case: Case, batches: Sequence[EncoderBatch]) -> list[Any]:
    plans = [plan_chunks(b.profile(), CHUNK_TOKENS) for b in batches]
    if case.parallel == "FSDP2 x2":  # All ranks run the same number of chunks.
        kinds = {chunk.kind for plan in plans for chunk in plan}
        counts = {kind: max(sum(chunk.kind == kind for chunk in plan) for plan in plans) for kind in kinds}
        plans = [match_counts(plan, counts, b.profile()) for plan, b in zip(plans, batches)]
    return plans


def encode_all(model: EmbeddingModel, batch: EncoderBatch, chunks: Sequence[Any]) -> Embeddings:
    # As the cache does: the first chunk of each kind comes before all others, and one without rows has a blank row.
    firsts = [next(c for c in chunks if c.kind == kind) for kind in dict.fromkeys(chunk.kind for chunk in chunks)]
    chunks = firsts + [chunk for chunk in chunks if not any(chunk is first for first in firsts)]
    outputs = [model(batch.select(c.rows) if c.rows else model.blank(Kind(c.kind))) for c in chunks]
    real = [(c, o) for c, o in zip(chunks, outputs) if not c.dummy]
    order = torch.argsort(torch.tensor([r for c, _ in real for r in c.rows]))
    width = max(o.values.size(1) for _, o in real)
    values = [pad(o.values, width) for _, o in real]
    masks = [None if o.mask is None else pad(o.mask, width) for _, o in real]
    mask = None if any(m is None for m in masks) else torch.cat([m for m in masks if m is not None])[order]
    return outputs[0]._replace(values=torch.cat(values)[order], mask=mask)


def pad(x: Tensor, width: int) -> Tensor:
    if x.ndim == 2 and x.dtype != torch.bool:
        return x  # One vector per row.
    return torch.nn.functional.pad(x, [0, 0] * (x.ndim - 2) + [0, width - x.size(1)])


def join(parts: Sequence[Embeddings], infos: Sequence[RowInfo], dtype: torch.dtype) -> tuple[Any, Any, RowInfo]:
    """Queries, documents (all positives, then all negatives) and facts of the rows of all ranks."""
    sizes = [info.query_ids.size(0) for info in infos]
    width = max(p.values.size(1) for p in parts)
    values = [pad(p.values, width) for p in parts]
    masks = [None if p.mask is None else pad(p.mask, width) for p in parts]

    def cut(tensors: Sequence[Any], start: int, stop: int) -> Tensor:
        return torch.cat([t[start * n : stop * n] for t, n in zip(tensors, sizes)])

    def both(tensors: Sequence[Any], first: int) -> Any:
        if tensors[0] is None:
            return None
        return torch.cat([cut(tensors, first, first + 1), cut(tensors, first + 1, first + 2)])

    query = parts[0]._replace(values=cut(values, 0, 1), mask=None if masks[0] is None else cut(masks, 0, 1))
    document = parts[0]._replace(values=both(values, 1), mask=both(masks, 1))
    facts: dict[str, Any] = {name: torch.cat([getattr(i, name) for i in infos]) for name in ("query_ids", "labels")}
    facts |= {n: both([getattr(i, n) for i in infos], 0) for n in ("document_ids", "scores", "teacher_document")}
    if infos[0].teacher_query is not None:
        facts["teacher_query"] = torch.cat([i.teacher_query for i in infos])
    if infos[0].one_sided is not None:
        facts["one_sided"] = torch.cat([i.one_sided for i in infos])
    for name in ("scores", "teacher_query", "teacher_document"):
        facts[name] = None if facts.get(name) is None else facts[name].to(dtype)
    return query, document, RowInfo(**facts)


def error_of(case: Case, rank: int, gangs: Gangs) -> float:
    """The relative L2 distance of a rank's gradients from the reference; infinite if they are of other parameters."""
    got, expected = run_case(case, rank, gangs), reference(case, gangs.dp.size)
    if got.keys() != expected.keys():
        return float("inf")
    pairs = [(g, own_shard(expected[name], g.shape, gangs.tp.rank)) for name, g in got.items()]
    difference = torch.cat([(g - e).double().reshape(-1) for g, e in pairs])
    return float(difference.norm() / torch.cat([e.double().reshape(-1) for _, e in pairs]).norm())


def errors_on_rank(rank: int, cases: list[Case]) -> list[float]:
    parallel = cases[0].parallel
    if parallel == "TP 2":
        root = ProcessGroupGang.create_default_process_group(CPU)
        gangs = create_parallel_gangs(root, tp_size=2)
    else:
        gangs = open_gangs(sharded=parallel == "FSDP2 x2")
    return [error_of(case, rank, gangs) for case in cases]


def errors_of(cases: Iterable[Case]) -> Iterator[tuple[Case, float]]:
    """Run cases; yield each with the worst error of any rank."""
    by_parallel: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_parallel[case.parallel].append(case)
    for parallel, own in by_parallel.items():
        if parallel == "1 process":
            gangs = create_fake_gangs(CPU)
            yield from ((case, error_of(case, 0, gangs)) for case in own)
        else:
            ranks = run_ranks(errors_on_rank, 2, own)
            yield from zip(own, map(max, zip(*ranks)))


def table(results: Iterable[tuple[Case, float]]) -> str:
    """The worst error of each objective, with and without Matryoshka, on each kind of gang; as Markdown."""
    worst: dict[tuple[str, str, str], float] = defaultdict(float)
    count: dict[tuple[str, str], int] = defaultdict(int)
    for case, error in results:
        name = case.objective + (", Matryoshka" if case.matryoshka else "")
        worst[name, case.parallel, case.dtype] = max(worst[name, case.parallel, case.dtype], error)
        count[case.parallel, case.dtype] += 1
    columns = [(p, d) for p in LEVELS["parallel"] for d in LEVELS["dtype"]]
    lines = ["| objective | " + " | ".join(f"{p}, {d}" for p, d in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(n for n, _, _ in worst):
        cells = (worst.get((name, *column)) for column in columns)
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.1e}" for c in cells) + " |")
    lines.append("| *cases* | " + " | ".join(str(count[column]) for column in columns) + " |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    results = list(errors_of(full() if "--full" in sys.argv else cells()))
    print(table(results))
    wrong = [(case, error) for case, error in results if not error <= tolerance(case)]
    for case, error in wrong:
        print(f"{error:.2e} {case}", file=sys.stderr)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

"""Losses and plain PyTorch loops over ranks give what one process gives."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from vembed_fs2.distributed import DdpSync, FsdpSync, LocalSync, RowGather, all_max, grad_sync_of
from vembed_fs2.gradcache import GradCache
from vembed_fs2.losses import InfoNCE, InfoNCEConfig, RowInfo
from vembed_fs2.losses.infonce import Direction

from .spawn import run_ranks

ALL: tuple[Direction, ...] = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")
BOTH = ALL[:2]

Rows = tuple[Tensor, Tensor, RowInfo]
Result = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]
"""The loss, its gradients with respect to queries, documents and scale, and metrics."""


def rank_rows(rank: int) -> Rows:
    """Embeddings of a rank: uneven, with explicit negatives, labels and duplicates that reach over ranks."""
    g = torch.Generator().manual_seed(rank)
    b, m = [3, 1, 4][rank], [5, 3, 4][rank]
    q, d = torch.randn(b, 6, generator=g), torch.randn(m, 6, generator=g)
    ids = torch.arange(b + m) + 100 * rank
    ids[b] = 7  # The same document on all ranks.
    labels = torch.tensor([i % 3 for i in range(b)])
    return q, d, RowInfo(ids[:b], ids[b:], labels)


def all_facts(rank: int, empty: int | None) -> Rows:
    """The same with all that is known of rows; one rank may have none."""
    q, d, rows = rank_rows(rank)
    b, m = q.size(0), d.size(0)
    g = torch.Generator().manual_seed(rank + 10)
    rows.negative_rows = torch.arange(m - b) % b
    rows.teacher_query, rows.teacher_document = torch.randn(b, 3, generator=g), torch.randn(m, 3, generator=g)
    if rank == empty:
        rows = RowInfo(**{name: value[:0] for name, value in vars(rows).items() if value is not None})
        q, d = q[:0], d[:0]
    return q, d, rows


def as_one_process_has_them(ranks: list[Rows]) -> Rows:
    """All positives come before all explicit negatives."""
    sizes = [q.size(0) for q, _, _ in ranks]

    def of_documents(parts: list[Tensor]) -> Tensor:
        return torch.cat([x[:n] for x, n in zip(parts, sizes)] + [x[n:] for x, n in zip(parts, sizes)])

    def of_queries(name: str) -> Tensor:
        return torch.cat([getattr(rows, name) for _, _, rows in ranks])

    rows = RowInfo(of_queries("query_ids"), of_documents([r.document_ids for _, _, r in ranks]), of_queries("labels"))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    owners = [r.negative_rows for _, _, r in ranks if r.negative_rows is not None]
    rows.negative_rows = torch.cat([owner + start for owner, start in zip(owners, starts)])
    rows.teacher_query = of_queries("teacher_query")
    rows.teacher_document = of_documents([r.teacher_document for _, _, r in ranks if r.teacher_document is not None])
    return torch.cat([q for q, _, _ in ranks]), of_documents([d for _, d, _ in ranks]), rows


def several_vectors(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Make embeddings of several vectors of each, of which a text has up to 4, and what fills it up to ``width``."""
    number = torch.arange(width)
    vectors = torch.stack([x.roll(int(n), 1) * (1 - 0.1 * n) for n in number], 1)
    length = 1 + (x[:, 0].abs() * 100).int() % min(width, 4)
    return vectors, number < length.unsqueeze(1)


CONFIGS: list[dict[str, Any]] = [
    {"directions": BOTH},
    {"directions": BOTH[:1], "similarity": "dot", "temperature": 0.5},
    {"directions": BOTH, "mask_same": False},
    {"directions": ALL, "partition": "joint"},
    {"directions": BOTH, "false_negatives": "filter_by_teacher", "false_negative_margin": 0.2},
    {"hardness": "in_batch", "hardness_strength": 2.0, "hardest": 4},
    {"directions": ALL, "partition": "joint", "similarity": "maxsim"},
]


def evaluate(loss: InfoNCE, values: dict[str, Any], data: Rows, width: int) -> Result:
    q, d, rows = data
    scale = torch.tensor([1.3])
    leaves = [t.requires_grad_() for t in (q, d, scale)]
    masks: dict[str, Tensor] = {}
    if values.get("similarity") == "maxsim":
        q, masks["query_mask"] = several_vectors(q, width)
        d, masks["document_mask"] = several_vectors(d, width + 1)
    output = loss(q, d, rows, scale, **masks)
    grads = torch.autograd.grad(output.loss, leaves)
    return (output.loss.detach(), *grads, output.metrics)


def run(function: Callable[[int], Any], size: int) -> list[Any]:
    """Call ``function(rank)`` in ``size`` processes of one group."""
    return [torch.load(io.BytesIO(content)) for content in run_ranks(in_group, size, function.__name__)]


def in_group(rank: int, name: str) -> bytes:
    dist.init_process_group("gloo")
    content = io.BytesIO()  # Tensors would be shared memory, which ends with the process.
    torch.save(globals()[name](rank), content)
    return content.getvalue()


def loss_over_ranks(rank: int) -> list[list[Result]]:
    """Of each configuration, first with rows on all ranks, then with none on the second."""
    results = []
    for values in CONFIGS:
        loss = InfoNCE(InfoNCEConfig(learn_temperature=True, **values), RowGather(dist.group.WORLD))
        # Ranks have texts of different lengths.
        results.append([evaluate(loss, values, all_facts(rank, empty), 4 + rank) for empty in (None, 1)])
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_global_negatives_of_uneven_ranks_equal_a_single_process(size: int) -> None:
    by_rank = run(loss_over_ranks, size)
    for idx, values in enumerate(CONFIGS):
        for case, empty in enumerate((None, 1)):
            ranks = [all_facts(r, empty) for r in range(size)]
            sizes = [q.size(0) for q, _, _ in ranks]
            loss = InfoNCE(InfoNCEConfig(learn_temperature=True, **values))
            value, q_grad, d_grad, scale_grad, metrics = evaluate(loss, values, as_one_process_has_them(ranks), 9)
            results = [r[idx][case] for r in by_rank]
            close = {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(torch.stack([r[0] for r in results]).sum(), value, **close)
            torch.testing.assert_close(torch.cat([r[1] for r in results]), q_grad, **close)
            got = [r[2][:n] for r, n in zip(results, sizes)] + [r[2][n:] for r, n in zip(results, sizes)]
            torch.testing.assert_close(torch.cat(got), d_grad, **close)
            torch.testing.assert_close(torch.stack([r[3] for r in results]).sum(0), scale_grad, **close)
            for name, number in metrics.items():
                total = sum(float(r[4][name]) for r in results)
                assert total == pytest.approx(float(number), rel=1e-5), (values, empty, name)


def loss_of_own_rows(rank: int) -> tuple[Tensor, Tensor, float]:
    gather = RowGather(dist.group.WORLD)
    q, d, rows = rank_rows(rank)
    local = InfoNCE(InfoNCEConfig(negatives="local"), gather)(q, d, rows).loss
    distinct = RowInfo.distinct(q.size(0), d.size(0))
    masked = InfoNCE(InfoNCEConfig(), gather)(q, d, distinct).metrics["masked_fraction"]
    return local, InfoNCE()(q, d, rows).loss, float(masked)


def test_local_negatives_are_those_of_the_own_rank_and_distinct_rows_differ_over_ranks() -> None:
    for local, alone, masked in run(loss_of_own_rows, 2):
        assert torch.equal(local, alone)
        assert masked == 0.0


class Model(nn.Module):
    """A model as in a loop without fairseq2: a part that images do not use, and a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 6))
        self.image = nn.Linear(7, 6)
        self.scale = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        values = self.text(x) if x.size(1) == 5 else self.image(x)
        return values, None, self.scale.clone()


def features(rank: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(10 * seed + rank)
    rows = 5 - 2 * rank
    return {"x": torch.randn(rows, 5, generator=g)}, {"y": torch.randn(rows, 7, generator=g)}


def contrast(gather: RowGather | None = None) -> Any:
    loss = InfoNCE(InfoNCEConfig(learn_temperature=True), gather)

    def compute(q: Any, d: Any) -> Tensor:
        rows = RowInfo.distinct(q[0].size(0), d[0].size(0))
        return loss(q[0], d[0], rows, q[2]).loss

    return compute


class Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.inner(next(iter(batch.values())))

    def encode(self, batch: dict[str, Tensor]) -> Any:
        return self.inner(next(iter(batch.values())))


def wrappers(module: nn.Module) -> dict[str, Any]:
    """The ways in which a loop may call its model."""
    holder = Holder(module)
    return {
        "module": holder,
        "method": holder.encode,
        "function": lambda batch: module(next(iter(batch.values()))),
        "two functions": [lambda batch: module(batch["x"]), lambda batch: module(batch["y"])],
    }


def mean_gradients() -> list[Tensor]:
    """What DDP and FSDP2 promise: the mean over ranks of the gradient of the sum over all rows."""
    model, loss = Model(), contrast()
    for seed in range(2):
        parts = [features(r, seed) for r in range(2)]
        q, d = torch.cat([p[0]["x"] for p in parts]), torch.cat([p[1]["y"] for p in parts])
        (loss(model(q), model(d)) * 8.0 / 2).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def relative_error(got: list[Tensor | None], expected: list[Tensor]) -> float:
    flat = torch.cat([(torch.full_like(e, torch.inf) if g is None else g).reshape(-1) for g, e in zip(got, expected)])
    reference = torch.cat([e.reshape(-1) for e in expected])
    return float((flat - reference).norm() / reference.norm())


def plain_loop(rank: int) -> dict[str, float]:
    results, expected = {}, mean_gradients()
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("ddp", {}),
        ("ddp", {"find_unused_parameters": True}),
        ("ddp", {"static_graph": True}),
        ("ddp", {"gradient_as_bucket_view": True}),
        ("fsdp", {}),
    ]
    for kind, options in kinds:
        for name in wrappers(nn.Identity()):
            module: nn.Module = Model()
            module = DistributedDataParallel(module, **options) if kind == "ddp" else fully_shard(module)
            encode = wrappers(module)[name]
            step = GradCache(encode, contrast(RowGather(dist.group.WORLD)), chunk_tokens=2, activation_budget=0)
            for seed in range(2):
                (step(*features(rank, seed)) * 8.0).backward()
            grads = [p.grad for p in module.parameters()]
            full = [g.full_tensor() if g is not None and hasattr(g, "full_tensor") else g for g in grads]
            results[f"{kind} {options} {name}"] = relative_error(full, expected)
    return results


def test_plain_loops_with_ddp_and_fsdp_get_the_mean_gradient_however_they_call_the_model() -> None:
    for errors in run(plain_loop, 2):
        assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


class DdpLoss(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, q: Tensor, d: Tensor) -> Tensor:
        return (normalize(q, dim=-1) * self.scale - normalize(d, dim=-1)).square().sum()


def loss_with_parameters(rank: int) -> list[Tensor]:
    torch.manual_seed(0)
    module, loss = DistributedDataParallel(nn.Linear(5, 4)), DistributedDataParallel(DdpLoss())
    step = GradCache(lambda b: module(b["x"]), loss, chunk_tokens=2, activation_budget=0)
    for seed in range(2):
        query, _ = features(rank, seed)
        _, other = features(rank, seed + 5)
        step(query, {"x": other["y"][:, :5]}).backward()
    return [p.grad for p in (*module.parameters(), *loss.parameters()) if p.grad is not None]


def test_parameters_of_a_loss_under_ddp_are_reduced() -> None:
    torch.manual_seed(0)
    module, loss = nn.Linear(5, 4), DdpLoss()
    for seed in range(2):
        for rank in range(2):
            q, d = features(rank, seed)[0]["x"], features(rank, seed + 5)[1]["y"][:, :5]
            (loss(module(q), module(d)) / 2).backward()
    expected = [p.grad for p in (*module.parameters(), *loss.parameters())]
    for grads in run(loss_with_parameters, 2):
        for got, reference in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, reference)


@dataclass
class Pair:
    module: Any
    name: str = ""


@dataclass(slots=True)
class Slots:
    parts: tuple[Any, ...]


class HiddenHolder(nn.Module):
    """Holds a module where torch does not look for one."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return x


class Plain:
    """No module itself."""

    def __init__(self, module: Any) -> None:
        self._towers = {"text": [module]}

    def encode(self, x: Tensor) -> Tensor:
        return x

    def __call__(self, x: Tensor) -> Tensor:
        return x


TOWERS: dict[str, Any] = {}


def encode_with_global(x: Tensor) -> Tensor:
    output: Tensor = TOWERS["text"](x)
    return output


def held(module: Any) -> list[Any]:
    """Encoders that use a module that something else holds."""
    named, listed, paired, nested = {"text": module}, [None, module], (module, 1), {"a": [{"b": (module,)}]}
    pair, slots, space, loop = Pair(module), Slots((1, module)), SimpleNamespace(inner=Pair(module)), [module]
    loop.append(loop)
    rows = [{"text": str(i)} for i in range(2000)]
    TOWERS["text"] = module
    return [
        lambda x: named["text"](x),
        lambda x: listed[1](x),
        lambda x: paired[0](x),
        lambda x: nested["a"][0]["b"][0](x),
        lambda x: pair.module(x),
        lambda x: slots.parts[1](x),
        lambda x: space.inner.module(x),
        lambda x: loop[0](x),
        lambda x, towers=named: towers["text"](x),
        lambda x, *, towers=named: towers["text"](x),
        lambda x: (rows, frozenset([module])),
        partial(lambda towers, x: towers["text"](x), named),
        lambda x: [f(x) for f in {"f": lambda y: module(y)}.values()],
        HiddenHolder(listed),
        HiddenHolder(pair),
        Plain(module),
        Plain(module).encode,
        encode_with_global,
    ]


def find_syncs(rank: int) -> list[str]:
    ddp, other = DistributedDataParallel(nn.Linear(2, 2)), DistributedDataParallel(nn.Linear(2, 2))
    sharded = fully_shard(nn.Sequential(nn.Linear(2, 2)))
    assert isinstance(sharded, FSDPModule)
    assert isinstance(grad_sync_of(ddp), DdpSync)
    assert isinstance(grad_sync_of(sharded), FsdpSync)
    assert isinstance(grad_sync_of(lambda x: sharded(x)), FsdpSync)
    assert isinstance(grad_sync_of(torch.nn.Linear(2, 2)), LocalSync)
    assert isinstance(grad_sync_of(lambda x: x), LocalSync)
    for encoder in held(ddp):
        assert isinstance(grad_sync_of(encoder), DdpSync)
    for encoder in held(sharded):
        assert isinstance(grad_sync_of(encoder), FsdpSync)
    for encoder in held(nn.Linear(2, 2)):
        assert isinstance(grad_sync_of(encoder), LocalSync)
    both = {"student": ddp, "teacher": other}
    with pytest.raises(ValueError, match="2 DDP or FSDP2 modules"):
        grad_sync_of(lambda x: both["student"](x))
    messages = []
    for encoder in (lambda x: ddp(other(x)), FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))):
        with pytest.raises((TypeError, ValueError)) as caught:
            grad_sync_of(encoder)
        messages.append(str(caught.value))
    with pytest.raises(ValueError, match="must be from 0 to 7"):
        grad_sync_of(sharded).agree_counts({8: 1})
    assert all_max([rank, -rank], None) == [1, 0]
    return messages


def test_how_gradients_are_reduced_is_found_from_the_encoder() -> None:
    for messages in run(find_syncs, 2):
        assert "2 DDP or FSDP2 modules" in messages[0]
        assert "FSDP1 is not supported" in messages[1]

"""Tiny models, batches and the reference gradient for the distributed tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from fairseq2.gang import Gangs, ProcessGroupGang, create_fake_gangs, create_fsdp_gangs, create_parallel_gangs
from fairseq2.models import ModelFamily
from fairseq2.nn.ddp import to_ddp
from fairseq2.nn.fsdp import to_fsdp
from fairseq2.runtime.dependency import DependencyLookup
from torch import Tensor
from torch.nn import Module

import vembed_fs2  # noqa: F401
from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.gradcache.planner import Chunk, match_counts, plan_chunks
from vembed_fs2.losses import InfoNCE, InfoNCEConfig, RowInfo
from vembed_fs2.losses.infonce import Direction
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from vembed_fs2.resolver import get_resolver

BOTH: tuple[Direction, ...] = ("query_to_document", "document_to_query")

CPU = torch.device("cpu")

BERT = BertConfig(
    model_dim=16, max_seq_len=32, vocab_size=50, num_layers=2, num_attn_heads=2, ffn_inner_dim=24,
    dropout_p=0.1, attn_dropout_p=0.1, logit_scale_init=2.0,
)  # fmt: skip

CLIP = ClipConfig(
    text=ClipTextConfig(
        model_dim=16, vocab_size=50, max_seq_len=16, num_layers=2, num_attn_heads=2, ffn_inner_dim=24,
        eos_idx=49, attn_dropout_p=0.1,
    ),
    vision=ClipVisionConfig(
        model_dim=16, image_size=8, patch_size=4, num_layers=2, num_attn_heads=2, ffn_inner_dim=24, attn_dropout_p=0.1
    ),
    projection_dim=12,
)  # fmt: skip


def family_of(config: object) -> ModelFamily:
    """The family that has configurations of this class."""
    resolver = get_resolver()
    names = [str(key) for key in DependencyLookup(resolver, ModelFamily).iter_keys()]
    families = (resolver.resolve(ModelFamily, key=name) for name in names if name.startswith("vembed_"))
    return next(family for family in families if family.config_kls is type(config))


def create_model(config: object, gangs: Gangs | None = None, *, checkpointing: bool = False) -> EmbeddingModel:
    """The same random model in every process."""
    torch.manual_seed(1)
    family = family_of(config)
    model = family.create_new_model(config, gangs or create_fake_gangs(CPU), torch.float32, False, True)
    assert isinstance(model, EmbeddingModel)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if checkpointing:
        family.apply_layerwise_ac(model, 1)
    return model.train()


def texts(rows: int, seed: int) -> EncoderBatch:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (rows,), generator=g)
    mask = torch.arange(12)[None] < lengths[:, None]
    ids = torch.randint(3, 48, (rows, 12), generator=g)
    ids[torch.arange(rows), lengths - 1] = 49
    return EncoderBatch.of_text(ids * mask, mask)


def images(rows: int, seed: int) -> EncoderBatch:
    g = torch.Generator().manual_seed(seed)
    return EncoderBatch.of_images(torch.randn(rows, 3, 8, 8, generator=g), tokens_per_image=5)


def rank_batch(config: object, rank: int, rows: int, seed: int) -> tuple[EncoderBatch, EncoderBatch, RowInfo]:
    """One rank's rows: queries, positives and one negative per row (texts), some rows sharing a label."""
    base = 1000 * seed + 10 * rank
    query = texts(rows, base)
    if isinstance(config, BertConfig):
        document = EncoderBatch.concat([texts(rows, base + 1), texts(rows, base + 2)])
    else:
        document = images(rows, base + 1)
    info = RowInfo.distinct(rows, document.num_rows)
    offset = 10_000 * (rank + 1)
    labels = torch.tensor([i % 3 for i in range(rows)])  # 0: no label
    ids = {"query_ids": info.query_ids + offset, "document_ids": info.document_ids + offset}
    return query, document, replace(info, **ids, labels=labels)


LOSS = InfoNCEConfig(learn_temperature=True, directions=BOTH)


def loss_of(gather: RowGather | None = None) -> Callable[..., Tensor]:
    loss = InfoNCE(LOSS, gather)
    return lambda q, d, rows: loss(q.values, d.values, rows, q.logit_scale).loss


def reference_gradient(
    config: object,
    batches: list[list[tuple[EncoderBatch, EncoderBatch, RowInfo]]],
    chunk_tokens: int,
    seeds: list[int],
    *,
    equal_counts: bool = False,
) -> dict[str, Tensor]:
    """The gradient of the plain loss on the concatenated batch: one process, one graph, no cache.

    Rows are encoded in the same chunks, and with the same random numbers, as
    each rank encodes them, so that dropout masks are the same.

    :param batches: for each accumulated batch, those of all ranks.
    :param equal_counts: whether all ranks run the same number of chunks, as with FSDP2.
    """
    model = create_model(config)
    states = []
    for seed in seeds:
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    for ranks in batches:
        plans = [_plan(EncoderBatch.concat([q, d]), chunk_tokens) for q, d, _ in ranks]
        if equal_counts:
            counts = {k: max(sum(c.kind == k for c in plan) for plan in plans) for k in {c.kind for c in plans[0]}}
            profiles = [EncoderBatch.concat([q, d]).profile() for q, d, _ in ranks]
            plans = [match_counts(plan, counts, profile) for plan, profile in zip(plans, profiles)]
        queries, documents, negatives, infos, scale = [], [], [], [], None
        for rank, (query, document, info) in enumerate(ranks):
            torch.set_rng_state(states[rank])
            values, scale = _encode_all(model, EncoderBatch.concat([query, document]), plans[rank])
            states[rank] = torch.get_rng_state()
            n = query.num_rows
            queries.append(values[:n])
            documents.append(values[n : 2 * n])
            negatives.append(values[2 * n :])
            infos.append(info)
        sizes = [q.size(0) for q in queries]
        info = RowInfo(
            torch.cat([i.query_ids for i in infos]),
            torch.cat(
                [i.document_ids[:n] for i, n in zip(infos, sizes)] + [i.document_ids[n:] for i, n in zip(infos, sizes)]
            ),
            torch.cat([i.labels for i in infos]),
        )
        output = InfoNCE(LOSS)(torch.cat(queries), torch.cat(documents + negatives), info, scale)
        output.loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _plan(batch: EncoderBatch, chunk_tokens: int) -> list[Chunk]:
    return plan_chunks(batch.profile(), chunk_tokens)


def _encode_all(model: EmbeddingModel, batch: EncoderBatch, chunks: list[Chunk]) -> tuple[Tensor, Any]:
    """All chunks with their graphs, in the engine's order: the first of each kind, then the rest."""
    kinds = [c.kind for c in chunks]
    firsts = {kinds.index(k) for k in kinds}
    parts: dict[int, Tensor] = {}
    scale = None
    for idx in sorted(range(len(chunks)), key=lambda i: (i not in firsts, i)):
        output = model(batch.select(chunks[idx].rows))
        if not chunks[idx].dummy:
            parts[idx] = output.values
        scale = output.logit_scale if idx == 0 else scale
    order = torch.tensor([r for idx in sorted(parts) for r in chunks[idx].rows])
    return torch.cat([parts[idx] for idx in sorted(parts)])[torch.argsort(order)], scale


def open_gangs(*, sharded: bool) -> Gangs:
    get_resolver()
    gangs = create_parallel_gangs(ProcessGroupGang.create_default_process_group(CPU))
    return create_fsdp_gangs(gangs) if sharded else gangs


def wrap(model: EmbeddingModel, config: object, gangs: Gangs, kind: str) -> Module:
    if kind == "ddp":
        return to_ddp(model, gangs)
    family = family_of(config)
    return to_fsdp(
        model, gangs, lambda m, w: family.apply_fsdp(m, "layer", w), version="v2", reshard_after_forward=True
    )


def full_gradients(module: Module) -> dict[str, Tensor]:
    """Gradients by the model's own parameter names, unsharded."""
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
            found[name] = grad.clone()
    return found


def relative_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    difference = torch.cat([(got[k] - expected[k]).double().reshape(-1) for k in expected])
    total = torch.cat([v.double().reshape(-1) for v in expected.values()])
    return float(difference.norm() / total.norm())

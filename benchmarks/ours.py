"""Worker of `train_step.py`: our steps."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workers import Step, serve

from vembed_fs2 import Embedder, GradCache, __version__
from vembed_fs2.data.example import Item
from vembed_fs2.embedding.model import Embeddings, EncoderBatch
from vembed_fs2.losses import InfoNCE, InfoNCEConfig


def main() -> None:
    settings = json.loads(sys.argv[1])
    device = torch.device(settings["device"])
    embedder = Embedder.load(settings["model"], device=device, max_length=settings["max_length"])
    embedder.model.train(settings["dropout"])
    rows = [json.loads(line) for line in Path(settings["data"]).read_text(encoding="utf-8").splitlines()]
    batches = [embedder.processor([Item(row[role]) for row in rows]) for role in ("query", "positive")]
    about = {"name": f"vembed_fs2 {__version__}", "lengths": [n for batch in batches for n in batch.profile().costs()]}
    for batch in batches:
        batch.to(device)
    serve(make_steps(embedder, batches, settings), embedder.model, device, about)


def make_steps(embedder: Embedder, batches: list[EncoderBatch], settings: dict[str, Any]) -> dict[str, Step]:
    model, device = embedder.model, torch.device(settings["device"])
    objective = InfoNCE(InfoNCEConfig(temperature=settings["temperature"]))

    def compute_loss(query: Embeddings, document: Embeddings) -> Tensor:
        return objective(query.values, document.values).loss / query.values.size(0)

    def run(forward: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings["bf16"]):
            loss: Tensor = forward(*batches)
        torch.autograd.backward(loss)
        return loss.detach()

    def cached(budget: int | str) -> GradCache:
        return GradCache(model, compute_loss, chunk_tokens=settings["chunk_tokens"], activation_budget=budget)

    def run_half() -> Tensor:
        if not half:
            # A step measures what the graph of a token takes.
            probe = cached(0)
            run(probe)
            model.zero_grad(set_to_none=True)
            half.append(cached(int(probe.stats.num_padded_tokens * probe.stats.bytes_per_token / 2)))
        return run(half[0])

    half: list[GradCache] = []
    nothing, everything = cached(0), cached("all")
    return {
        "ours, plain": Step(partial(run, lambda query, document: compute_loss(model(query), model(document)))),
        "ours, nothing kept": Step(partial(run, nothing), lambda: nothing.stats.kept_fraction),
        "ours, half kept": Step(run_half, lambda: half[0].stats.kept_fraction),
        "ours, all kept": Step(partial(run, everything), lambda: everything.stats.kept_fraction),
    }


if __name__ == "__main__":
    main()

"""Worker of `train_step.py`: the steps of sentence-transformers and of GradCache, in an environment of their own."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer, losses
from torch import Tensor
from workers import Step, serve


def main() -> None:
    settings = json.loads(sys.argv[1])
    device = torch.device(settings["device"])
    transformers.utils.logging.disable_progress_bar()
    model = SentenceTransformer(settings["model"], device=str(device), backend="torch")
    model.max_seq_length = settings["max_length"] or model.max_seq_length
    model.train(settings["dropout"])
    rows = [json.loads(line) for line in Path(settings["data"]).read_text(encoding="utf-8").splitlines()]
    preprocess = model.preprocess if hasattr(model, "preprocess") else model.tokenize
    features = [preprocess([row[role] for row in rows]) for role in ("query", "positive")]
    lengths = [int(n) for f in features for n in f["attention_mask"].sum(1)]
    features = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in f.items()} for f in features]
    if settings["bf16"]:
        # As its trainer does (accelerate): recomputed passes must be under autocast as well.
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    steps = sentence_transformers_steps(model, features, settings)
    name = f"sentence-transformers {sentence_transformers.__version__}, transformers {transformers.__version__}"
    cache = load_gradcache()
    if cache is not None:
        name += ", GradCache"
        for rows in settings["rows"]:
            steps[f"GradCache, {rows} rows"] = Step(gradcache_step(cache, model, features, rows, settings))
    serve(steps, model, device, {"name": name, "lengths": lengths})


def sentence_transformers_steps(
    model: SentenceTransformer, features: list[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Step]:
    scale = 1.0 / settings["temperature"]
    plain = losses.MultipleNegativesRankingLoss(model, scale=scale)
    cached = partial(losses.CachedMultipleNegativesRankingLoss, model, scale=scale)

    def run(loss_of: torch.nn.Module) -> Tensor:
        # Copies, because modules add to the features that they get.
        loss: Tensor = loss_of([dict(f) for f in features], None)
        loss.backward()
        return loss.detach()

    steps = {"sentence-transformers, plain": Step(partial(run, plain))}
    for rows in settings["rows"]:
        name = f"sentence-transformers, cached, {rows} rows"
        steps[name] = Step(partial(run, cached(mini_batch_size=rows)))
    # Since version 6.
    if "mini_batch_num_tokens" in inspect.signature(losses.CachedMultipleNegativesRankingLoss).parameters:
        tokens = settings["chunk_tokens"]
        name = f"sentence-transformers, cached, {tokens} tokens"
        steps[name] = Step(partial(run, cached(mini_batch_num_tokens=tokens)))
    return steps


def load_gradcache() -> Any:
    """Return the class of luyug's package, or ``None`` if it is not installed."""
    if find_spec("grad_cache") is None:
        spec = find_spec("gradcache")
        if spec is None:
            return None
        # The package on PyPI is installed under one name and imports itself under another.
        package = ModuleType("grad_cache")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["grad_cache"] = package
    return import_module("grad_cache.grad_cache").GradCache


def gradcache_step(
    cache: Any, model: SentenceTransformer, features: list[dict[str, Any]], rows: int, settings: Mapping[str, Any]
) -> Callable[[], Tensor]:
    tensors = [{k: v for k, v in f.items() if isinstance(v, Tensor)} for f in features]

    def loss(query: Tensor, document: Tensor) -> Tensor:
        scores = query @ document.T / settings["temperature"]
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))

    step = cache(models=[_Encoder(model)] * 2, chunk_sizes=rows, loss_fn=loss)
    return partial(step, *tensors)


class _Encoder(torch.nn.Module):
    """Takes keyword arguments, as GradCache passes them, and returns unit embeddings."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, **features: Tensor) -> Tensor:
        values = self.model(features)["sentence_embedding"].float()
        return torch.nn.functional.normalize(values, dim=-1)


if __name__ == "__main__":
    main()

"""Random models of sentence-transformers. This runs under every version that is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import sentence_transformers
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

from .cases import TEXTS, Case, Vectors
from .families import POSITIONS, is_version_5

POOLINGS: Final = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

PROMPTS: Final = {"query": "who is ", "document": "the man: "}

_REFUSE_FIRST_TOKEN: Final = ("llama", "mistral", "qwen2", "qwen3")
"""Causal decoders that we do not read with the pooling of a token that sees no other."""

_ACTIVATIONS: Final = (torch.nn.Identity, torch.nn.Tanh, torch.nn.ReLU)


def write_sentence_model(case: Case, backbone: Path, folder: Path) -> None:
    """Write a folder whose Transformer is in ``backbone``, with random modules after it."""
    rng = case.rng
    torch.manual_seed(case.seed)
    transformer = load_transformer(case, backbone)
    if case.family.startswith("siglip"):
        # What the models were trained with; sentence-transformers would pad to the longest text of a batch.
        transformer.processing_kwargs = {
            "text": {"padding": "max_length", "max_length": min(transformer.tokenizer.model_max_length, POSITIONS)}
        }
    modules: list[Any] = [transformer]
    if case.reads == {"text"}:
        if rng.random() < 0.7:
            transformer.max_seq_length = rng.choice((7, 11, 20))
        modes = rng.sample(POOLINGS, rng.choice((1, 1, 2)))
        if modes == ["cls"] and case.family in _REFUSE_FIRST_TOKEN:
            modes = ["lasttoken"]
        size = transformer.get_word_embedding_dimension()
        pooling = Pooling(size, pooling_mode=_mode(modes), include_prompt=rng.random() < 0.7)
        modules.append(pooling)
        size *= len(modes)
        for _ in range(rng.choice((0, 0, 1, 2))):
            width = rng.choice((8, 12))
            modules.append(Dense(size, width, bias=rng.random() < 0.5, activation_function=rng.choice(_ACTIVATIONS)()))
            size = width
    if rng.random() < 0.5:
        modules.append(Normalize())

    prompts = {name: text for name, text in PROMPTS.items() if rng.random() < 0.5}
    default = rng.choice(list(prompts)) if prompts and rng.random() < 0.3 else None
    model = SentenceTransformer(
        modules=modules,
        prompts=prompts,
        default_prompt_name=default,
        similarity_fn_name=rng.choice(("cosine", "dot")),
    )
    model.save(str(folder))


def load_transformer(case: Case, folder: Path) -> Any:
    return Transformer(str(folder), **_options(case))


def _options(case: Case) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "image" in case.reads:
        options["processor_kwargs"] = {"backend": "pil"} if is_version_5() else {"use_fast": False}
    if case.family == "gemma2":
        options["model_kwargs"] = {"attn_implementation": "eager"}
    return options


def _mode(modes: list[str]) -> Any:
    if len(modes) == 1:
        return modes[0]
    return tuple(modes) if _version() >= (5, 4) else "+".join(modes)


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in sentence_transformers.__version__.split(".")[:2])


def run_sentence_model(case: Case, folder: Path, images: list[Image.Image]) -> Vectors:
    """What sentence-transformers makes of texts and images."""
    model = SentenceTransformer(str(folder), device="cpu", **_options(case))
    vectors: Vectors = {"text": np.stack([model.encode(text) for text in TEXTS])}
    vectors["query"] = np.stack([model.encode_query(text) for text in TEXTS])
    vectors["document"] = np.stack([model.encode_document(text) for text in TEXTS])
    if "image" in case.reads:
        vectors["image"] = np.stack([model.encode(image) for image in images])
    return vectors

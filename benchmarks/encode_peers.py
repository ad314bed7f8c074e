"""Worker of `encode.py`: sentence-transformers, and the modules of transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers
from encode_side import id_inputs, image_inputs, in_batches, serve
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    settings = json.loads(sys.argv[1])
    transformers.utils.logging.disable_progress_bar()
    name = f"sentence-transformers {sentence_transformers.__version__}, transformers {transformers.__version__}"
    steps = text_steps(settings) if settings["texts"] else module_steps(settings)
    serve(steps, settings, name)


def text_steps(settings: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    texts = json.loads(Path(settings["texts"]).read_text(encoding="utf-8"))
    folder, device = settings["folder"], settings["device"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    steps: dict[str, Callable[[], Any]] = {}
    for kind, dtype in TYPES.items():
        peer = SentenceTransformer(folder, device=device, backend="torch").to(dtype)
        model = load(folder, dtype, device)
        for rows in settings["rows"]:
            name = f"{rows} rows, {kind}"
            steps[f"texts: sentence-transformers, {name}"] = partial(encode_by_peer, peer, texts, rows)
            length = peer.max_seq_length
            steps[f"texts: transformers, {name}"] = partial(encode_texts, model, tokenizer, texts, rows, length)
    return steps


def encode_by_peer(model: SentenceTransformer, texts: list[str], rows: int) -> Any:
    options = {"convert_to_tensor": True, "normalize_embeddings": True, "show_progress_bar": False}
    return model.encode(texts, batch_size=rows, **options).float().cpu().numpy()


def encode_texts(model: Any, tokenizer: Any, texts: list[str], rows: int, max_length: int) -> Any:
    """The usual loop: texts sorted by length, mean pooling, unit length."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    parts = []
    for start in range(0, len(order), rows):
        own = [texts[i] for i in order[start : start + rows]]
        inputs = tokenizer(own, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        inputs = inputs.to(model.device)
        with torch.inference_mode():
            states = model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(2)
        parts.append((states * mask).sum(1) / mask.sum(1))
    values = torch.empty(len(texts), parts[0].size(1))
    values[torch.tensor(order)] = torch.cat(parts).cpu()
    return torch.nn.functional.normalize(values, dim=-1).numpy()


def module_steps(settings: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    device, rows = settings["device"], settings["image_rows"]
    pixels = image_inputs(settings["images"], settings["image_size"])
    steps = {}
    for kind, dtype in TYPES.items():
        model = load(settings["folder"], dtype, device)
        encode = partial(encode_images, model, dtype)
        steps[f"images: transformers, {kind}"] = partial(in_batches, encode, pixels, rows, device)
        if settings["text_length"]:
            ids = id_inputs(settings["images"], settings["text_length"], settings["vocab_size"])
            steps[f"token ids: transformers, {kind}"] = partial(
                in_batches,
                lambda part, model=model: features(model.get_text_features(input_ids=part)),
                ids,
                rows,
                device,
            )
    return steps


def encode_images(model: Any, dtype: torch.dtype, pixels: Tensor) -> Tensor:
    if hasattr(model, "get_image_features"):
        return features(model.get_image_features(pixel_values=pixels.to(dtype)))
    states: Tensor = model(pixel_values=pixels.to(dtype)).last_hidden_state
    return states[:, 0]


def features(output: Any) -> Tensor:
    """A tensor until version 4, and since version 5 an output with one."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def load(folder: str, dtype: torch.dtype, device: str) -> Any:
    return AutoModel.from_pretrained(folder).to(device=device, dtype=dtype).eval()


if __name__ == "__main__":
    main()

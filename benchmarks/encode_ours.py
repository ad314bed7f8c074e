"""Worker of `encode.py`: our side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from encode_side import id_inputs, image_inputs, in_batches, serve
from torch import Tensor

from vembed_fs2 import Embedder, EncoderBatch, __version__, load_model


def main() -> None:
    settings = json.loads(sys.argv[1])
    steps = text_steps(settings) if settings["texts"] else module_steps(settings)
    serve(steps, settings, f"vembed_fs2 {__version__}")


def text_steps(settings: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    texts = json.loads(Path(settings["texts"]).read_text(encoding="utf-8"))
    folder, device = settings["folder"], settings["device"]
    plain = Embedder.load(folder, device=device)
    autocast = Embedder.load(folder, device=device)
    autocast.autocast_dtype = torch.bfloat16
    weights = Embedder.load(folder, device=device, dtype=torch.bfloat16)
    return {
        "texts: ours, fp32": partial(plain.encode, texts, normalize_embeddings=True),
        "texts: ours, bf16": partial(autocast.encode, texts, normalize_embeddings=True),
        "texts: ours, bf16 weights": partial(weights.encode, texts, normalize_embeddings=True),
    }


def module_steps(settings: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    device, rows = settings["device"], settings["image_rows"]
    inputs = {"images": image_inputs(settings["images"], settings["image_size"])}
    if settings["text_length"]:
        inputs["token ids"] = id_inputs(settings["images"], settings["text_length"], settings["vocab_size"])
    steps = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.float32), ("bf16 weights", torch.bfloat16)):
        model = load_model(settings["folder"], device=device, dtype=dtype)
        for name, values in inputs.items():
            make = EncoderBatch.of_images if name == "images" else EncoderBatch.of_text

            def encode(part: Tensor, model: Any = model, make: Any = make) -> Tensor:
                embeddings: Tensor = model(make(part)).values
                return embeddings

            def run(encode: Any = encode, values: Tensor = values, autocast: bool = kind == "bf16") -> Any:
                # Around all batches, as `Embedder` does it: weights are cast once.
                with torch.autocast(device, torch.bfloat16, enabled=autocast):
                    return in_batches(encode, values, rows, device)

            steps[f"{name}: ours, {kind}"] = run
    return steps


if __name__ == "__main__":
    main()

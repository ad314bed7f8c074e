"""The memory and time of loading a checkpoint: 1 GiB of random float32 tensors in several files.

Memory is the peak of what the process holds itself (anonymous, not pages of
mapped files), above what it holds after the imports; it is divided by the size
of the files. Each load runs in a process of its own.

The aim: at most 1.1 times what the model holds, which is 1 in float32 and 0.5 in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import hardware, print_table

GIB = 2**30

BERT = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522}

DINOV2 = {"hidden_size": 1024, "num_attention_heads": 16, "use_swiglu_ffn": True, "image_size": 224, "patch_size": 14}

QWEN3 = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 64_000,
    "tie_word_embeddings": True,
}

SIGLIP = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**BERT, "num_hidden_layers": 34}),
    "modernbert": ("ModernBert", {**BERT, "vocab_size": 50368, "num_hidden_layers": 24, "intermediate_size": 3072}),
    "vit": ("ViT", {**SIGLIP, "num_hidden_layers": 37}),
    "dinov2_gate": ("Dinov2", {**DINOV2, "num_hidden_layers": 21}),
    "siglip": (
        "Siglip",
        {
            "text_config": {**SIGLIP, "num_hidden_layers": 15, "vocab_size": 32_000},
            "vision_config": {**SIGLIP, "num_hidden_layers": 18},
        },
    ),
    "auto": ("Qwen3", {**QWEN3, "num_hidden_layers": 13}),
}
"""The class of transformers, and its configuration; each makes about 1 GiB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["bert", "vit", "auto"])
    parser.add_argument("--layers", type=int, help="layers instead of those that make 1 GiB, to try")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.worker:
        print(json.dumps(load(Path(args.worker[0]), getattr(torch, args.worker[1]))))
        return

    print(f"{hardware(torch.device('cpu'))}\n")
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            size = write_checkpoint(Path(folder), *MODELS[name], args.layers)
            for dtype in ("float32", "bfloat16"):
                command = [sys.executable, __file__, "--worker", folder, dtype]
                found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
                ratio, held = found["peak"] / size, found["peak"] / found["held"]
                rows.append(
                    [name, dtype, f"{size / GIB:.2f}", f"{ratio:.2f}", f"{held:.2f}", f"{found['seconds']:.1f}"]
                )
    print_table(["model", "dtype", "files (GiB)", "peak / files", "peak / model", "seconds"], rows)


def write_checkpoint(folder: Path, name: str, config: dict[str, Any], layers: int | None) -> int:
    """Write random tensors as transformers does, in files of about 256 MiB; return their bytes."""
    import transformers
    from safetensors.torch import save_file

    hf_config = getattr(transformers, f"{name}Config")(**config)
    if layers is not None:
        for part in (hf_config, *(getattr(hf_config, n) for n in ("text_config", "vision_config") if n in config)):
            part.num_hidden_layers = layers
    hf_config.architectures = [f"{name}Model"]
    hf_config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in getattr(transformers, f"{name}Model")(hf_config).state_dict().items()}

    shards: list[dict[str, torch.Size]] = [{}]
    room = GIB // 4
    for key, shape in shapes.items():
        if room < shape.numel() * 4:
            shards.append({})
            room = GIB // 4
        room -= shape.numel() * 4
        shards[-1][key] = shape

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({k: torch.randn(s) * 0.02 for k, s in shard.items()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    size = sum(shape.numel() for shape in shapes.values()) * 4
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    folder.joinpath("model.safetensors.index.json").write_text(json.dumps(index))
    return size


def load(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """Load the model; return the peak and the model's own size in bytes, and the seconds."""
    import transformers  # noqa: F401

    from vembed_fs2.hub.load import load_model
    from vembed_fs2.resolver import get_resolver

    get_resolver()
    with watched() as peak:
        began = time.perf_counter()
        model = load_model(folder, dtype=dtype)
        seconds = time.perf_counter() - began
    # Views of one tensor count once.
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {"peak": peak[0], "held": sum(tensors.values()), "seconds": seconds}


@contextmanager
def watched() -> Iterator[list[int]]:
    """Look at the memory all the while; the list then holds the peak above that at the start."""
    start, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def anonymous_memory() -> int:
    """The bytes that the process holds besides pages of files (Linux only)."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()

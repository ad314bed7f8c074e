"""Inference in bfloat16: our modules and transformers' own, loaded in bfloat16 with the same weights and inputs.

One process runs single passes over the same batches in turns: transformers'
module, ours with weights in bfloat16, and ours by autocast. all-MiniLM-L6-v2 has
its own weights; the other models have random ones, of the real sizes. Texts
are documentation, tokenized once; images are random pixels.

Prints the median time of a pass, and the median ratio of the passes of a round.
Times on CPUs are of the processor and not of the clock, so that a round does not
count the time in which other processes had the cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Table, hardware, synchronize
from texts import add_data_arguments, read_pairs
from torch import Tensor
from torch.nn.functional import cosine_similarity

BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


@dataclass(frozen=True)
class Model:
    """A model with random weights."""

    kind: str
    """The name of its classes in transformers."""

    options: Mapping[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ("texts",)
    text_length: int = 0
    """The tokens of all texts, for models whose texts have one length."""


MODELS = {
    "minilm": Model("Bert"),
    "bert": Model("Bert", BASE),
    "distilbert": Model("DistilBert"),
    "mpnet": Model("MPNet"),
    "modernbert": Model("ModernBert", {"classifier_pooling": "mean"}),
    "clip": Model("CLIP", reads=("images", "token ids"), text_length=77),
    "siglip": Model("Siglip", reads=("images", "token ids"), text_length=64),
    "vit": Model("ViT", reads=("images",)),
    "dinov2": Model("Dinov2", {"hidden_size": 384, "num_attention_heads": 6, "image_size": 224}, reads=("images",)),
}

Encode = Callable[[], Tensor]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    device = torch.device(args.device)
    print(f"{hardware(device)}; torch {torch.__version__}, transformers {transformers.__version__}; ", end="")
    print(f"median of {args.repeats}\n")
    header = ["step", "transformers ms", "ours ms", "ours / theirs", "autocast / theirs", "cosine", "their cosine"]
    table = Table(header, [30])
    for name in args.models:
        with TemporaryDirectory() as folder:
            path = args.model if name == "minilm" else write_model(MODELS[name], Path(folder), args.layers)
            for step, sides in create_steps(name, path, args, device):
                add_row(table, f"{name} {step}", sides, args.repeats, device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    add_data_arguments(parser)
    parser.add_argument("--texts", type=int, default=48, metavar="N", help="texts (default: 48)")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="texts in a batch (default: 16)")
    parser.add_argument("--max-length", type=int, default=128, metavar="N", help="longest text in tokens")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="images, in one batch (default: 8)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds after the first (default: 7)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--layers", type=int, metavar="N", help="layers of models with random weights, to try")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def write_model(model: Model, folder: Path, layers: int | None) -> Path:
    import transformers

    options = dict(model.options)
    if layers is not None:
        options["n_layers" if model.kind == "DistilBert" else "num_hidden_layers"] = layers
    if "token ids" in model.reads:
        options = {f"{tower}_config": options for tower in ("text", "vision")}

    torch.manual_seed(0)
    config = getattr(transformers, f"{model.kind}Config")(**options)
    getattr(transformers, f"{model.kind}Model")(config).save_pretrained(folder)
    return folder


def create_steps(
    name: str, folder: Path, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, dict[str, Encode]]]:
    """Yield what is encoded, and what encodes it by the name of its side."""
    from transformers import AutoModel

    from vembed_fs2 import EncoderBatch, load_model

    theirs, theirs_in_half = (
        AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval() for dtype in (torch.float32, torch.bfloat16)
    )
    ours, ours_in_half = (load_model(folder, device=device, dtype=dtype) for dtype in ("float32", "bfloat16"))
    model = MODELS[name]

    for reads in model.reads:
        batches = list(_batches(reads, model, theirs.config, args, device))
        make = EncoderBatch.of_images if reads == "images" else EncoderBatch.of_text
        own_batches = [make(*batch) for batch in batches]
        yield (
            reads,
            {
                "fp32": partial(_encode_by_transformers, theirs, batches, reads),
                "transformers": partial(_encode_by_transformers, theirs_in_half, batches, reads),
                "ours": partial(_encode, ours_in_half, own_batches, autocast=False),
                "autocast": partial(_encode, ours, own_batches, autocast=True),
            },
        )


def _batches(
    reads: str, model: Model, config: Any, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Pixels; token ids of one length; or token ids of texts of about one length, and their mask."""
    g = torch.Generator().manual_seed(0)
    if reads == "images":
        yield (torch.randn(args.images, 3, 224, 224, generator=g).to(device),)
    elif reads == "token ids":
        size = config.text_config.vocab_size
        ids = torch.randint(3, size - 1, (args.rows, model.text_length), generator=g)
        ids[:, -1] = size - 1
        yield (ids.to(device),)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        texts = _texts(args.data)[: args.texts]
        texts.sort(key=len)
        for start in range(0, len(texts), args.rows):
            options = {"padding": True, "truncation": True, "max_length": args.max_length, "return_tensors": "pt"}
            inputs = tokenizer(texts[start : start + args.rows], **options).to(device)
            yield inputs["input_ids"], inputs["attention_mask"]


@cache
def _texts(file: Path | None) -> list[str]:
    return [text for row in read_pairs(file) for text in (row["query"], row["positive"])]


def _encode_by_transformers(model: Any, batches: list[tuple[Tensor, ...]], reads: str) -> Tensor:
    found = []
    for batch in batches:
        if reads == "texts":
            ids, mask = batch
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            found.append((states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))
        elif reads == "token ids":
            found.append(model.get_text_features(input_ids=batch[0]))
        elif hasattr(model, "get_image_features"):
            found.append(model.get_image_features(pixel_values=batch[0].to(model.dtype)))
        else:
            found.append(model(pixel_values=batch[0].to(model.dtype)).last_hidden_state[:, 0])
    return torch.cat(found).float()


def _encode(model: Any, batches: list[Any], *, autocast: bool) -> Tensor:
    with torch.autocast(batches[0].device.type, torch.bfloat16, enabled=autocast):
        return torch.cat([model(batch).values for batch in batches]).float()


@torch.inference_mode()
def add_row(table: Table, name: str, sides: dict[str, Encode], repeats: int, device: torch.device) -> None:
    """Run all sides once for their embeddings, and then in turns for the time."""
    values = {side: encode() for side, encode in sides.items()}
    cosines = [f"{cosine_similarity(values[s], values['fp32']).min():.6f}" for s in ("ours", "transformers")]

    timed = ("transformers", "ours", "autocast")
    times: dict[str, list[float]] = {side: [] for side in timed}
    for _ in range(repeats):
        for side in timed:
            times[side].append(_seconds(sides[side], device))

    theirs = times["transformers"]
    ratios = (statistics.median(t / own for t, own in zip(theirs, times[s])) for s in ("ours", "autocast"))
    cells = [f"{statistics.median(times[side]) * 1e3:,.1f}" for side in ("transformers", "ours")]
    table.add([name, *cells, *(f"{ratio:.2f}" for ratio in ratios), *cosines])


def _seconds(encode: Encode, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    began = clock()
    encode()
    synchronize(device)
    return clock() - began


if __name__ == "__main__":
    main()

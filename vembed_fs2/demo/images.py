"""Data, model folders and evaluation of the image demo: a small model learns handwritten digits from captions.

The 1,797 digits (8 x 8 pixels, 17 greys) come from scikit-learn, so the demo
downloads nothing. Digits of one class carry one label: in training they are
never each other's negatives.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vembed_fs2.data.example import Item
from vembed_fs2.demo import write_rows
from vembed_fs2.errors import DataError
from vembed_fs2.files import write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vembed_fs2.evaluation.retrieval import SupportsEncode
    from vembed_fs2.evaluation.task import RetrievalTask
    from vembed_fs2.models.composed import ComposedConfig

WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

TEMPLATES: Final = (
    "a photo of the digit {word}",
    "a handwritten {word}",
    "handwritten {digit}",
    "the number {digit}",
    "a small grey image of the number {word}",
    "someone wrote a {digit}",
)

ZERO_SHOT_TEMPLATE: Final = TEMPLATES[0]
"""The caption that an image is compared with to tell its class."""

IMAGE_SIZE: Final = 16
"""The digits are enlarged to this many pixels a side by the image processor."""

_PAD, _UNKNOWN, _START, _END = "<pad>", "<unk>", "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class DigitFiles:
    """The files of the image demo."""

    train: Path
    """JSONL rows of ``query`` (a caption), ``positive_image`` and ``label``: what to train on."""

    held_out: Path
    """The same for the held-out digits."""


def caption(digit: int, template: str) -> str:
    """Describe a digit."""
    return template.format(word=WORDS[digit], digit=digit)


def write_digits(out: Path, *, num_held_out: int = 360, seed: int = 0) -> DigitFiles:
    """Write the digits as PNG files, and the rows to train and to evaluate on.

    The held-out digits are drawn by class, in proportion, and the captions from
    :data:`TEMPLATES`, both with the seed. A digit to train on gives five rows:
    as it is, and moved by one pixel to each side, since 1,437 digits are few to
    learn from.

    :raises DataError: scikit-learn is not installed.
    """
    from PIL import Image

    pixels, digits = _load_digits()
    held_out = _stratified(digits, num_held_out, seed)
    draw = random.Random(seed)
    rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    (out / "images").mkdir(parents=True, exist_ok=True)

    for i, digit in enumerate(digits):
        for n, image in enumerate([pixels[i]] if i in held_out else _moved(pixels[i])):
            name = f"images/{i:04}-{n}.png"
            Image.fromarray(image).save(out / name)

            # Drawn, not in turns: the digits come in a regular order, and a class would miss some templates.
            text = caption(digit, draw.choice(TEMPLATES))
            rows[i in held_out].append({"query": text, "positive_image": name, "label": str(digit)})

    files = DigitFiles(out / "train.jsonl", out / "held_out.jsonl")
    write_rows(files.train, rows[False])
    write_rows(files.held_out, rows[True])

    return files


def _moved(image: NDArray[Any]) -> list[NDArray[Any]]:
    import numpy as np

    size = image.shape[0]
    padded = np.pad(image, 1)
    corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))

    return [padded[y : y + size, x : x + size] for y, x in corners]


def _load_digits() -> tuple[NDArray[Any], list[int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("The digits come with scikit-learn: pip install 'vembed_fs2[demo]'.") from None

    bunch = load_digits()

    # 16 is white in scikit-learn's data.
    return (bunch.images * (255.0 / 16.0)).round().astype("uint8"), [int(d) for d in bunch.target]


def _stratified(digits: Sequence[int], count: int, seed: int) -> set[int]:
    order = list(range(len(digits)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: digits[i])  # Stable: shuffled within a class.

    # Evenly spaced places in the classes laid end to end are in proportion to their sizes.
    return {order[(2 * n + 1) * len(order) // (2 * count)] for n in range(count)}


def write_model_folder(out: Path, *, seed: int = 0) -> None:
    """Write a Hugging Face folder of a small CLIP with random weights, its tokenizer and its image processor.

    ``transformers`` loads it with ``CLIPModel``, ``AutoTokenizer`` and
    ``AutoImageProcessor``; the train recipe takes it as ``model.path``.
    """
    import torch
    from transformers import CLIPConfig, CLIPModel

    out.mkdir(parents=True, exist_ok=True)

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(**_clip_config(tokenizer)))

    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_json(out / "preprocessor_config.json", _image_processor_config())


def write_composed_folder(out: Path, *, seed: int = 0) -> None:
    """Write a folder of a BERT and a DINOv2 with random weights, composed, with their tokenizer and image processor.

    The train recipe takes it as ``model.path``.
    """
    import torch
    from fairseq2.gang import create_fake_gangs
    from fairseq2.models import ModelFamily

    from vembed_fs2.models.composed import COMPOSED_FAMILY, ComposedCheckpointFormat
    from vembed_fs2.resolver import get_resolver

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()

    config = _composed_config(tokenizer)
    family = get_resolver().resolve(ModelFamily, key=COMPOSED_FAMILY)
    gangs = create_fake_gangs(torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.create_new_model(config, gangs, torch.float32, meta=False, init_rank0_only=False)

    ComposedCheckpointFormat().save(out, dict(model.state_dict()), config)
    tokenizer.save_pretrained(out)
    write_json(out / "preprocessor_config.json", _image_processor_config())


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    captions = (caption(digit, template) for template in TEMPLATES for digit in range(10))
    words = dict.fromkeys(word for text in captions for word in text.split())

    # The end of text is not id 2: transformers reads that id as "the largest id in the row".
    vocabulary = {word: i for i, word in enumerate([_PAD, _UNKNOWN, _START, _END, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}",
        special_tokens=[(token, vocabulary[token]) for token in (_START, _END)],
    )

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        model_max_length=16,
        model_input_names=["input_ids", "attention_mask"],
    )


def _clip_config(tokenizer: Any) -> dict[str, Any]:
    tower: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tower |= {"projection_dim": 32, "hidden_act": "gelu"}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }

    return {
        "text_config": {**tower, **text},
        "vision_config": {**tower, "image_size": IMAGE_SIZE, "patch_size": 8},
        "projection_dim": tower["projection_dim"],
    }


def _composed_config(tokenizer: Any) -> ComposedConfig:
    from vembed_fs2.models.bert import BERT_FAMILY, BertConfig
    from vembed_fs2.models.composed import ComposedConfig, TowerConfig
    from vembed_fs2.models.vit import VIT_FAMILY, VitConfig

    sizes: dict[str, Any] = {"model_dim": 128, "num_layers": 2, "num_attn_heads": 4}
    text = BertConfig(
        vocab_size=len(tokenizer),
        max_seq_len=tokenizer.model_max_length,
        pad_idx=tokenizer.pad_token_id,
        ffn_inner_dim=512,
        pooler=False,
        **sizes,
    )
    image = VitConfig(
        model_type="dinov2",
        image_size=IMAGE_SIZE,
        patch_size=8,
        mlp_ratio=4.0,
        layer_scale_init=1.0,
        layer_norm_eps=1e-6,
        **sizes,
    )

    return ComposedConfig(
        text=TowerConfig(family=BERT_FAMILY, config=text),
        image=TowerConfig(family=VIT_FAMILY, config=image),
        embedding_dim=32,
    )


def _image_processor_config() -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def digit_tasks(folder: Path) -> dict[str, RetrievalTask]:
    """Return what the demo measures on the held-out digits that :func:`write_digits` wrote to ``folder``.

    - ``zero_shot``: from an image to the one caption of its class.
    - ``t2i``: from each of the 60 captions to the images of its class.
    - ``i2t``: from an image to the captions of its class.
    - ``i2i``: from an image to the other images of its class.
    """
    from vembed_fs2.evaluation.task import RetrievalTask

    lines = (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    images = [Item(images=(folder / row["positive_image"],)) for row in rows]
    digits = [int(row["label"]) for row in rows]
    classes = [Item(caption(digit, ZERO_SHOT_TEMPLATE)) for digit in range(10)]
    captions = [Item(caption(digit, template)) for template in TEMPLATES for digit in range(10)]
    of_caption = [digit for _ in TEMPLATES for digit in range(10)]

    return {
        "zero_shot": RetrievalTask(images, classes, _same_class(digits, range(10))),
        "t2i": RetrievalTask(captions, images, _same_class(of_caption, digits)),
        "i2t": RetrievalTask(images, captions, _same_class(digits, of_caption)),
        "i2i": RetrievalTask(images, images, _same_class(digits, digits), exclude_self=True),
    }


def _same_class(queries: Sequence[int], documents: Sequence[int]) -> list[dict[int, float]]:
    members: list[dict[int, float]] = [{} for _ in range(10)]
    for i, digit in enumerate(documents):
        members[digit][i] = 1.0
    return [members[digit] for digit in queries]


def evaluate_digits(embedder: SupportsEncode, folder: Path, *, batch_size: int | None = None) -> dict[str, float]:
    """Measure an embedder on the held-out digits.

    ``zero_shot_accuracy`` is the share of images whose nearest class caption is
    right; ``i2i_recall@1`` the share whose nearest other image shows the same
    digit (Recall@1 as in Stanford Online Products). ``t2i/...``, ``i2t/...``
    and ``i2i/...`` are ``hit@k``, ``mrr``, ``ndcg@10`` and ``map`` of the tasks
    of :func:`digit_tasks`.
    """
    from vembed_fs2.evaluation.retrieval import evaluate_embedder

    tasks = digit_tasks(folder)

    measured = {name: evaluate_embedder(embedder, task, batch_size=batch_size) for name, task in tasks.items()}
    results = {
        "zero_shot_accuracy": measured["zero_shot"]["hit@1"],
        "i2i_recall@1": measured["i2i"]["hit@1"],
    }
    for name in ("t2i", "i2t", "i2i"):
        for metric in ("hit@1", "hit@5", "mrr", "ndcg@10", "map"):
            results[f"{name}/{metric}"] = measured[name][metric]

    return results

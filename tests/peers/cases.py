"""What is compared: small random models, each with its inputs, and what a library makes of them.

This runs under every version of transformers that is compared, and imports
nothing else of this project.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np
import torch
import transformers
from PIL import Image

from .families import FAMILIES, POSITIONS, Family, Values, is_version_5
from .tokenizer import make_tokenizer

TEXTS: Final = (
    "a man is eating food",
    "x",
    "The quick brown Fox, twice",
    "who wrote Faust?",
    "two women are talking about the weather and a man",
)

SIZES: Final = ((16, 16), (32, 32), (40, 25), (19, 60))
"""Width and height of the images."""

Vectors = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A folder that a library wrote."""

    family: str
    layout: str
    """``hf`` or ``sentence-transformers``."""

    seed: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.seed}-{self.layout}"

    @property
    def reads(self) -> frozenset[str]:
        return FAMILIES[self.family].reads

    @property
    def rng(self) -> Random:
        return Random(f"{self.family} {self.seed}")


SEEDS: Final = range(3)


def list_cases() -> list[Case]:
    """All that are compared.

    ``PEERS_FAMILIES`` in the environment names those that are wanted, to look at one.
    sentence-transformers reads no text Transformer of SigLIP. We read no images
    alone from it, and write none: there is no place for the pooling of patches.
    """
    names = os.environ.get("PEERS_FAMILIES", "").split() or FAMILIES
    cases = []
    for name in names:
        has_sentences = FAMILIES[name].reads != {"image"} and not name.startswith(("siglip_text", "siglip2_text"))
        layouts = ["hf", "sentence-transformers"] if has_sentences else ["hf"]
        cases += [Case(name, layout, seed) for layout in layouts for seed in SEEDS]
    return cases


def make_images(rng: Random) -> list[Image.Image]:
    """Draw photographs of noise."""
    noise = np.random.default_rng(rng.randrange(1000))
    images = []
    for width, height in SIZES:
        small = noise.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        images.append(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    return images


def make_model(family: Family, model_type: str, values: Values) -> Any:
    """Create a model with random weights."""
    if family.kls is not None:
        kls = getattr(transformers, family.kls)
        model = kls(kls.config_class(**values))
    else:
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **values))

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)  # What starts as zero, too.
    return model.eval()


def write_model(case: Case, folder: Path) -> None:
    """Write a random model in transformers' layout."""
    family, rng = FAMILIES[case.family], case.rng
    torch.manual_seed(case.seed)
    values = family.configure(rng)
    if case.family == "siglip2" and case.layout != "hf":
        # The processor of both versions has these sizes, whatever a folder says.
        values["vision_config"]["patch_size"] = 16

    tokenizer = processor = None
    if family.tokenizer is not None:
        tokenizer = make_tokenizer(rng, family.tokenizer, case.family)
        values.get("text_config", values)["vocab_size"] = len(tokenizer) + rng.choice((0, 3))
    if family.processors:
        processor = make_image_processor(rng, rng.choice(family.processors), values)
        if case.layout != "hf" and hasattr(processor, "max_num_patches"):
            processor.max_num_patches = 256

    make_model(family, case.family, values).save_pretrained(folder)
    save_processors(rng, case.family, tokenizer, processor, folder)


def save_processors(rng: Random, model_type: str, tokenizer: Any, processor: Any, folder: Path) -> None:
    """Write both in files of their own, or together as version 5 does."""
    classes = {"clip": "CLIPProcessor", "siglip": "SiglipProcessor", "siglip2": "Siglip2Processor"}
    if model_type in classes and rng.random() < 0.5:
        kls = getattr(transformers, classes[model_type])
        try:
            kls(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
            return
        except TypeError:  # Version 4 takes only the classes of its own.
            pass

    for part in (tokenizer, processor):
        if part is not None:
            part.save_pretrained(folder)


def make_image_processor(rng: Random, name: str, values: Values) -> Any:
    """Draw the options of an image processor, so that its images fit the model."""
    vision = values.get("vision_config", values)
    options: Values = {
        "image_mean": [rng.uniform(0.3, 0.6) for _ in range(3)],
        "image_std": [rng.uniform(0.2, 0.5) for _ in range(3)],
        "resample": rng.choice((2, 3)),
        "do_normalize": rng.random() < 0.8,
        "do_convert_rgb": True,
    }
    if name == "Siglip2ImageProcessor":
        options |= {"patch_size": vision["patch_size"], "max_num_patches": rng.choice((9, 16))}
    else:
        side = vision["image_size"]
        square = {"height": side, "width": side}
        if name in ("CLIPImageProcessor", "BitImageProcessor"):
            crops = rng.random() < 0.7
            options |= {"do_center_crop": crops, "crop_size": square}
            options["size"] = {"shortest_edge": side + rng.choice((0, 4))} if crops else square
        else:
            options["size"] = square
    return image_processor_class(name)(**options)


def image_processor_class(name: str) -> Any:
    """The class that prepares images with Pillow, if there is one."""
    if is_version_5():
        return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return getattr(transformers, f"{name}Fast" if name.startswith("DINOv3") else name)


def load_image_processor(folder: Path) -> Any:
    """Load the image processor that uses Pillow, if there is one."""
    if is_version_5():
        try:
            return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (ValueError, ImportError):
            return transformers.AutoImageProcessor.from_pretrained(folder)
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    except (ValueError, ImportError):
        return transformers.AutoImageProcessor.from_pretrained(folder, use_fast=True)


def run_model(case: Case, folder: Path, images: list[Image.Image]) -> Vectors:
    """What transformers makes of texts and images; its own loading and its own inputs."""
    family = FAMILIES[case.family]
    if family.kls is not None:
        model = getattr(transformers, family.kls).from_pretrained(folder)
    else:
        # Version 4 would leave out the limit of attention scores.
        options = {"attn_implementation": "eager"} if case.family == "gemma2" else {}
        model = transformers.AutoModel.from_pretrained(folder, **options)
    model.eval()
    vectors: Vectors = {}
    if "text" in case.reads:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        for idx, text in enumerate(TEXTS):
            inputs = dict(tokenizer([text], return_tensors="pt", **_text_options(case, tokenizer)))
            vectors[f"ids/{idx}"] = inputs["input_ids"][0].numpy()
            _add(vectors, f"text/{idx}", _call(model, "text", inputs), inputs.get("attention_mask"))
    if "image" in case.reads:
        processor = load_image_processor(folder)
        for idx, image in enumerate(images):
            inputs = dict(processor([image], return_tensors="pt"))
            vectors[f"pixels/{idx}"] = inputs["pixel_values"][0].numpy()
            _add(vectors, f"image/{idx}", _call(model, "image", inputs), inputs.get("pixel_attention_mask"))
    return vectors


def _text_options(case: Case, tokenizer: Any) -> Values:
    if case.family == "t5":  # Its positions are relative: any number of them will do.
        return {"truncation": tokenizer.model_max_length < 1000}

    limit = min(tokenizer.model_max_length, POSITIONS)
    if case.family.startswith(("siglip", "clip")):
        # All texts have the full length.
        return {"truncation": True, "max_length": limit, "padding": "max_length"}
    return {"truncation": True, "max_length": limit}


def _call(model: Any, kind: str, inputs: Values) -> Any:
    features = getattr(model, f"get_{kind}_features", None)
    function = features or model.forward
    names = inspect.signature(function).parameters
    if "noise" in names:  # MAE shuffles patches, even if it masks none.
        size = int((inputs["pixel_values"].shape[-1] // model.config.patch_size) ** 2)
        inputs = inputs | {"noise": torch.arange(size).float()[None]}
    with torch.no_grad():
        output = function(**{name: value for name, value in inputs.items() if name in names or "kwargs" in names})
    # Version 4 gives the features alone.
    return getattr(output, "pooler_output", output) if features is not None else output


def _add(vectors: Vectors, name: str, output: Any, mask: Any) -> None:
    if isinstance(output, torch.Tensor):
        vectors[f"{name}/features"] = output[0].numpy()
        return

    pooled = getattr(output, "pooler_output", None)
    states = output.last_hidden_state[0]
    if mask is not None and states.ndim == 2 and mask.shape[1] == states.shape[0]:
        states = states[mask[0].bool()]
    vectors[f"{name}/states"] = states.numpy()
    if pooled is not None:
        vectors[f"{name}/features"] = pooled[0].flatten().numpy()


def save_vectors(vectors: Vectors, file: Path) -> None:
    np.savez(file, **vectors)


def load_vectors(file: Path) -> Vectors:
    with np.load(file) as values:
        return dict(values)


def save_images(images: list[Image.Image], folder: Path) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for idx, image in enumerate(images):
        image.save(folder / f"{idx}.png")


def load_images(folder: Path) -> list[Image.Image]:
    return [Image.open(folder / f"{idx}.png").convert("RGB") for idx in range(len(SIZES))]

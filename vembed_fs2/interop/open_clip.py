"""Writes models as folders that open_clip loads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from vembed_fs2.errors import VembedError
from vembed_fs2.files import new_folder, write_json
from vembed_fs2.formats.folder import IMAGE_HEAD_FILE
from vembed_fs2.formats.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, read_pair
from vembed_fs2.interop import Exportable
from vembed_fs2.interop.finish import finish_folder
from vembed_fs2.models.family import get_open_clip_format, head_of
from vembed_fs2.processing.open_clip import OpenClipPreprocessing, OpenClipTransform
from vembed_fs2.processing.towers import TowerProcessor

_INTERPOLATIONS: Final = {2: "bilinear", 3: "bicubic"}
"""By Pillow's numbers."""

_CLIP_VOCAB_SIZE: Final = 49_408
"""The size of the vocabulary that open_clip brings along."""


def save_open_clip(exported: Exportable, folder: Path) -> None:
    """Write a folder for ``open_clip.create_model_from_pretrained("local-dir:FOLDER")``.

    open_clip always cleans texts, and rounds the offsets of crops in its own
    way; so embeddings of a model that came from transformers can differ a little there.

    :raises VembedError: open_clip cannot express the model or its processor; the message names the option.
    """
    source = exported.source
    checkpoint_format = get_open_clip_format(source.family)

    head = head_of(source.config)
    if head is not None and not head.is_pooler_alone:
        raise VembedError("open_clip has no place for the `head` of a model, which replaces its own poolings.")

    processor = exported.processor
    if not isinstance(processor, TowerProcessor):
        raise VembedError(f"open_clip cannot express the {type(processor).__name__} of {source.family} models.")

    model_cfg = checkpoint_format.config_to_open_clip(source.config)
    model_cfg["text_cfg"].update(_describe_tokenizer(processor, folder.name))

    preprocess_cfg = _describe_images(processor, model_cfg["vision_cfg"]["image_size"])
    tensors = {k: v.detach().cpu() for k, v in exported.model.state_dict().items()}
    state = checkpoint_format.state_dict_to_open_clip(tensors, source.config)
    with new_folder(folder) as out:
        tensors = {k: v.contiguous() for k, v in state.items() if isinstance(v, Tensor)}
        save_file(tensors, out / OPEN_CLIP_WEIGHTS, metadata={"format": "pt"})
        content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
        write_json(out / OPEN_CLIP_CONFIG, checkpoint_format.add_extra_fields(content, source.config))
        if head is not None:  # Whether embeddings are normalised, which open_clip leaves to its caller.
            write_json(out / IMAGE_HEAD_FILE, asdict(head))
        finish_folder(exported, out, folder.name)


def _describe_tokenizer(processor: TowerProcessor, name: str) -> dict[str, Any]:
    """The options of ``text_cfg`` that are the tokenizer's.

    :param name: stands for the tokenizer; open_clip takes the folder's, if there is a name.
    """
    assert processor.text is not None

    settings, tokenizer = processor.settings, processor.text.tokenizer
    cleaning = settings.text_cleaning
    is_clip = type(tokenizer).__name__.startswith("CLIPTokenizer") and len(tokenizer) == _CLIP_VOCAB_SIZE
    if settings.open_clip_bpe or is_clip:
        return {"tokenizer_kwargs": {"clean": cleaning}} if cleaning not in ("", "lower") else {}

    options: dict[str, Any] = {"clean": cleaning} if cleaning else {}
    if settings.strip_sep_token:
        options["strip_sep_token"] = True

    return {"hf_tokenizer_name": name, "tokenizer_kwargs": options}


def _describe_images(processor: TowerProcessor, image_size: object) -> dict[str, Any]:
    """Return ``preprocess_cfg``."""
    assert processor.image is not None
    size = read_pair(image_size, "image_size")
    size = (size, size) if isinstance(size, int) else size

    transform = processor.image.backend
    if isinstance(transform, OpenClipTransform):
        config = transform.config
    else:
        config = _convert_processor(transform)

    if config.size != size:
        raise VembedError(
            f"open_clip prepares images of the model's own size {size}, but the processor's is {config.size}."
        )

    return {name: value for name, value in asdict(config).items() if name != "size"}


def _convert_processor(processor: Any) -> OpenClipPreprocessing:
    """What an image processor of transformers does, in open_clip's words."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(processor, name, False):
            raise VembedError(f"open_clip cannot express `{name}` = False of the image processor.")

    if abs(processor.rescale_factor - 1 / 255) > 1e-9:
        raise VembedError("open_clip cannot express `rescale_factor` of the image processor.")

    interpolation = _INTERPOLATIONS.get(int(processor.resample))
    if interpolation is None:
        raise VembedError("open_clip cannot express `resample` of the image processor.")

    size, mode = dict(processor.size), "squash"
    if getattr(processor, "do_center_crop", False):
        edge, size, mode = size.get("shortest_edge"), dict(processor.crop_size), "shortest"
        if set(size.values()) != {edge}:
            raise VembedError("open_clip cannot express `size` of the image processor: it must equal the crop's.")

    if set(size) != {"height", "width"}:
        raise VembedError("open_clip cannot express `size` of the image processor.")

    red, green, blue = processor.image_mean
    red_std, green_std, blue_std = processor.image_std

    return OpenClipPreprocessing(
        size=(size["height"], size["width"]),
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
        interpolation=interpolation,
        resize_mode=mode,
    )

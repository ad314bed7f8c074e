"""The processor of Qwen3-VL-Embedding: its template, its instruction, its budget of pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.processing.chat import ChatProcessor, load_chat_processor
from vembed_fs2.processing.towers import find_settings

INSTRUCTION: Final = "Represent the user's input."
"""The instruction of an input that has none, as in the reference (github.com/QwenLM/Qwen3-VL-Embedding)."""

MAX_LENGTH: Final = 8192
"""The longest input in tokens, as in the reference."""

MIN_PIXELS: Final = 4 * 32 * 32
MAX_PIXELS: Final = 1800 * 32 * 32
"""Smaller and larger images are resized, as in the reference: to 4 to 1,800 tokens."""

TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""How Qwen3-VL writes a conversation, for folders whose tokenizer has no template."""


def load_qwen3_vl_processor(model: EmbeddingModel, folder: Path, max_length: int | None) -> ChatProcessor:
    """Load the processor of a model from a folder.

    :raises ModelLoadError: a file is missing or broken.
    """
    from vembed_fs2.models.qwen3_vl.model import Qwen3VLModel

    assert isinstance(model, Qwen3VLModel)
    settings, folder = find_settings(folder)
    longest = min(MAX_LENGTH, model.max_text_length or MAX_LENGTH)

    return load_chat_processor(
        folder,
        settings,
        lambda values: _create_image_processor(values, model),
        max_length=max_length or settings.max_length or longest,
        model_max_length=model.max_text_length,
        vocab_size=model.vocab_size,
        placeholders=(model.visual_ids[0], *model.frame_ids),
        default_instruction=INSTRUCTION,
        default_template=TEMPLATE,
    )


def _create_image_processor(values: dict[str, Any], model: Any) -> Any:
    """Create transformers' own processor, the one that uses Pillow.

    :raises ValueError: its patches are not the model's.
    """
    from transformers import Qwen2VLImageProcessor

    size = values.get("size") or {}
    known = {key: value for key, value in values.items() if key != "size"}
    known["min_pixels"] = values.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS
    known["max_pixels"] = values.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS

    processor = Qwen2VLImageProcessor.from_dict(known)
    patch_dim = 3 * processor.temporal_patch_size * processor.patch_size**2
    if patch_dim != model.patch_dim or processor.merge_size != model.vision.merge_size:
        raise ValueError(
            f"patches of {processor.temporal_patch_size} x {processor.patch_size} x {processor.patch_size}, merged"
            f" {processor.merge_size} x {processor.merge_size}, are not the model's"
        )
    return processor

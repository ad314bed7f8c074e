"""Inputs of all kinds -> :class:`EncoderBatch`, as one model wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from vembed_fs2.data.decode import decode_image
from vembed_fs2.data.example import ImageSource, Item
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.model import TextPadding
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.files import read_json, write_json
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.processing.image import ImageProcessor
from vembed_fs2.processing.open_clip import OpenClipTexts
from vembed_fs2.processing.patches import cut_patches
from vembed_fs2.processing.text import TextProcessor

_SETTINGS_FILE: Final = "vembed_processor.json"

# What models call the prompt of documents, in the order in which sentence-transformers looks for it.
_DOCUMENT_PROMPTS: Final = ("document", "passage", "corpus")


@dataclass(kw_only=True)
class ProcessorSettings:
    """What a tokenizer and an image processor do not say themselves."""

    max_length: int | None = None
    """The longest text in tokens; longer ones are cut."""

    prompts: dict[str, str] = field(default_factory=dict)
    """Texts put before an input, by name; ``query`` and ``document`` are used for these roles."""

    default_prompt_name: str | None = None
    """The prompt that is used when none is asked for."""

    instruction_template: str = "{instruction} "
    """How an instruction is put before a text."""

    include_prompt: bool = True
    """If ``False``, the tokens of prompts take no part in mean pooling."""

    do_lower_case: bool = False
    """If ``True``, texts are lowercased before tokenization."""

    text_cleaning: str = ""
    """How texts are cleaned before tokenization, as open_clip does it; not at all if empty."""

    open_clip_bpe: bool = False
    """If ``True``, CLIP's tokenizer does what open_clip's own does, on cleaned texts."""

    strip_sep_token: bool = False
    """If ``True``, separator tokens become tokens of index 0, as in CLIPA."""


class Processor:
    """Tokenizes texts, decodes and transforms images. Safe to call from several threads."""

    def __init__(
        self,
        text: TextProcessor | None,
        image: ImageProcessor | None,
        settings: ProcessorSettings | None = None,
        *,
        tokens_per_image: int = 1,
        text_padding: TextPadding = "longest",
    ) -> None:
        self.text = text
        self.image = image
        self.settings = settings or ProcessorSettings()
        self.tokens_per_image = tokens_per_image
        self.text_padding = text_padding
        self.image_root: Path | None = None
        """Where images must lie; anywhere if ``None``."""
        self.allow_urls = False
        """If ``True``, images may be fetched from URLs."""

    def __call__(self, items: Sequence[Item], *, prompt: str | None = None) -> EncoderBatch:
        """Prepare ``items``, one row each.

        :param prompt: put before each text that has no instruction of its own.
        :raises DataError: an image cannot be read, or the model cannot take a kind of input.
        """
        batch = EncoderBatch(
            len(items), tokens_per_image=self.tokens_per_image, fixed_width=self.text_padding == "max_length"
        )
        texts = [(row, item) for row, item in enumerate(items) if item.text is not None]
        if texts:
            self._add_texts(batch, texts, prompt or "")
        if any(item.images for item in items):
            self._add_images(batch, items)
        return batch

    def _add_texts(self, batch: EncoderBatch, texts: Sequence[tuple[int, Item]], prompt: str) -> None:
        if self.text is None:
            source = texts[0][1].source
            raise DataError(f"{f'{source}: ' if source else ''}The model has no text encoder, but an input has a text.")
        prefixes = [self._prefix(item, prompt) for _, item in texts]
        has_prefix = any(prefixes)
        batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.pooling_mask = self.text(
            [item.text or "" for _, item in texts],
            prefixes=prefixes if has_prefix else None,
            mask_prefixes=has_prefix and not self.settings.include_prompt,
        )
        batch.text_rows = torch.tensor([row for row, _ in texts])

    def _prefix(self, item: Item, prompt: str) -> str:
        if item.instruction:
            return self.settings.instruction_template.replace("{instruction}", item.instruction)
        return prompt

    def _add_images(self, batch: EncoderBatch, items: Sequence[Item]) -> None:
        # One by one: photographs are a hundred times larger than the pixels that a model takes.
        pixels = [self._prepare_image_of(item, image) for item in items for image in item.images]
        patch_size = getattr(self.image, "patch_size", None)
        if patch_size is not None:
            batch.pixel_values, batch.patch_mask, batch.spatial_shapes = cut_patches(pixels, patch_size)
        elif len({p.shape for p in pixels}) > 1:
            raise DataError(
                "Images have different sizes after resizing. Set `do_center_crop`, or a `size` of `height` and `width`."
            )
        else:
            batch.pixel_values = torch.stack(pixels)
        batch.image_rows = torch.tensor([row for row, item in enumerate(items) for _ in item.images])

    def _prepare_image_of(self, item: Item, image: ImageSource) -> Tensor:
        try:
            return self.prepare_image(image)
        except DataError as ex:
            raise DataError(f"{item.source}: {ex}" if item.source else str(ex)) from ex

    def prepare_image(self, image: ImageSource | Tensor) -> Tensor:
        """Decode and transform one image; pixel values are returned as they are.

        :returns: *Shape:* ``[C, H, W]``.
        :raises DataError: the image cannot be read, or the model takes none.
        """
        if isinstance(image, Tensor):
            return image
        if self.image is None:
            raise DataError("The model has no image encoder, but an input has an image.")
        return self.image([decode_image(image, root=self.image_root, allow_urls=self.allow_urls)])[0]

    def role_prompt(self, role: str) -> str | None:
        """The name of the prompt for a role (``query`` or ``document``), if there is one."""
        names = _DOCUMENT_PROMPTS if role == "document" else (role,)
        return next((name for name in names if name in self.settings.prompts), None)

    def prompt_for(self, role: str | None) -> str | None:
        """The prompt of a role (``query`` or ``document``), else the default prompt."""
        prompts = self.settings.prompts
        if role is not None and (name := self.role_prompt(role)) is not None:
            return prompts[name]
        default = self.settings.default_prompt_name
        return prompts.get(default) if default is not None else None

    def save(self, folder: Path) -> None:
        """Write tokenizer, image processor and settings to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.text is not None:
            self.text.save(folder)
        if self.image is not None:
            self.image.save(folder)
        write_json(folder / _SETTINGS_FILE, asdict(self.settings))

    @staticmethod
    def load(
        folder: Path,
        modalities: frozenset[str],
        *,
        max_length: int | None = None,
        model_max_length: int | None = None,
        tokens_per_image: int = 1,
        text_padding: TextPadding = "longest",
    ) -> Processor:
        """Load what a Hugging Face, sentence-transformers or run folder says.

        :param modalities: what the model takes: ``text``, ``image`` or both.
        :param max_length: overrides the folder's longest text.
        :param model_max_length: the longest text that the model can take at all.
        :param text_padding: whether texts are padded to the longest of a batch, or all to the longest there can be.
        :raises ModelLoadError: a file is missing or broken.
        """
        settings, folder = _read_settings(folder)
        lengths = [n for n in (max_length or settings.max_length, model_max_length) if n is not None]
        text = image = None
        if "text" in modalities:
            limit = min(lengths) if lengths else None
            text = TextProcessor.load(
                folder,
                max_length=limit,
                do_lower_case=settings.do_lower_case,
                padding=text_padding,
                open_clip=OpenClipTexts(
                    text_cleaning=settings.text_cleaning,
                    open_clip_bpe=settings.open_clip_bpe,
                    strip_sep_token=settings.strip_sep_token,
                ),
            )
            settings.max_length = text.max_length
        if "image" in modalities:
            image = ImageProcessor.load(folder)
        return Processor(text, image, settings, tokens_per_image=tokens_per_image, text_padding=text_padding)


def _read_settings(folder: Path) -> tuple[ProcessorSettings, Path]:
    """The settings, and the folder with the tokenizer's and the image processor's files."""
    file = folder / _SETTINGS_FILE
    if file.is_file():
        values = read_json(file)
        known = {f.name for f in fields(ProcessorSettings)}
        if unknown := sorted(set(values) - known):
            raise ModelLoadError(f"{file} has unknown keys: {', '.join(unknown)}.")
        return _check_types(ProcessorSettings(**values), file), folder
    opened = ModelFolder.maybe_open(folder)
    return (
        (ProcessorSettings(), folder)
        if opened is None
        else (ProcessorSettings(**opened.text_options()), opened.backbone)
    )


def _check_types(settings: ProcessorSettings, file: Path) -> ProcessorSettings:
    default = ProcessorSettings()
    for f in fields(settings):
        value, example = getattr(settings, f.name), getattr(default, f.name)
        kinds = {"max_length": (int, type(None)), "default_prompt_name": (str, type(None))}.get(
            f.name, (type(example),)
        )
        if type(value) not in kinds:
            raise ModelLoadError(f"{file}: `{f.name}` must not be {value!r}.")
    if not all(isinstance(p, str) for p in settings.prompts.values()):
        raise ModelLoadError(f"{file}: `prompts` must hold texts by name.")
    return settings


def as_item(value: object) -> Item:
    """Convert one input of ``Embedder.encode`` to an :class:`Item`.

    A ``str`` is a text, a ``Path``, bytes or PIL image is an image; a dict may
    have ``text``, ``image`` (one or a list) and ``instruction``.

    :raises DataError: ``value`` is none of these, or is empty.
    """
    if isinstance(value, Item):
        item = value
    elif isinstance(value, str):
        item = Item(text=value)
    elif isinstance(value, (Path, bytes, Image.Image)):
        item = Item(images=(value,))
    elif isinstance(value, dict):
        item = _item_of_dict(value)
    else:
        raise DataError(
            f"An input must be a str, a PIL image, a path, bytes or a dict, but is of type `{type(value).__name__}`."
        )
    if item.text is None and not item.images:
        raise DataError("An input has neither a text nor an image.")
    return item


def _item_of_dict(value: dict[str, object]) -> Item:
    if unknown := sorted(set(value) - {"text", "image", "instruction"}):
        raise DataError(f"An input has unknown keys: {', '.join(map(str, unknown))}. Known: text, image, instruction.")
    text, image, instruction = value.get("text"), value.get("image"), value.get("instruction")
    if not isinstance(text, (str, type(None))) or not isinstance(instruction, (str, type(None))):
        raise DataError("`text` and `instruction` of an input must be of type `str`.")
    images = image if isinstance(image, (list, tuple)) else [] if image is None else [image]
    return Item(text=text, images=tuple(_image_source(i) for i in images), instruction=instruction)


def _image_source(value: object) -> ImageSource:
    if isinstance(value, str):
        return value if "://" in value else Path(value)
    if isinstance(value, (Path, bytes, Image.Image)):
        return value
    raise DataError(f"An image must be a path, bytes or a PIL image, but is of type `{type(value).__name__}`.")

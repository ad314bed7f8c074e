"""Inputs of all kinds -> :class:`EncoderBatch`, as one model wants them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Generic, TypeVar

from PIL import Image as PILImage
from typing_extensions import final

from vembed_fs2.data.example import Image, ImageSource, Item, Part, Role, Text
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.errors import DataError
from vembed_fs2.processing.settings import ProcessorSettings as ProcessorSettings

# What models call the prompt of documents, in the order in which sentence-transformers looks for it.
_DOCUMENT_PROMPTS: Final = ("document", "passage", "corpus")

PreparedT = TypeVar("PreparedT")


class Processor(ABC, Generic[PreparedT]):
    """Makes batches of inputs, in two steps. Safe to call from several threads.

    :meth:`prepare` does what takes long and concerns one input: it decodes and
    resizes images. :meth:`collate` does what needs all inputs of a batch: it
    tokenizes, pads and stacks. A family with its own rules has its own subclass.
    """

    def __init__(self, settings: ProcessorSettings | None = None) -> None:
        self.settings = settings or ProcessorSettings()

        self.image_root: Path | None = None
        """The folder that images must lie in; anywhere if ``None``."""

        self.allow_urls = False
        """If ``True``, images may be fetched from URLs."""

    @abstractmethod
    def prepare(self, item: Item) -> PreparedT:
        """Decode and transform the images of an input.

        :raises DataError: an image cannot be read, or the model cannot take the
            input; the message names ``item.source`` if there is one.
        """

    @abstractmethod
    def collate(
        self, prepared: Sequence[PreparedT], *, role: Role | None = None, prompt: str | None = None
    ) -> EncoderBatch:
        """Make a batch of prepared inputs, one row each.

        :param role: the side that the inputs stand on, for models that treat the two sides differently.
        :param prompt: put before each text that has no instruction of its own; the prompt of the role if ``None``.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write all files that the processor is loaded from."""

    @final
    def __call__(self, items: Sequence[Item], *, role: Role | None = None, prompt: str | None = None) -> EncoderBatch:
        """Prepare and collate ``items``.

        :raises DataError: an image cannot be read, or the model cannot take an input.
        """
        return self.collate([self.prepare(item) for item in items], role=role, prompt=prompt)

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


def as_item(value: object) -> Item:
    """Convert one input of ``Embedder.encode`` to an :class:`Item`.

    A ``str`` is a text, a ``Path``, bytes or PIL image is an image. A dict may
    have ``text``, ``image`` (one or a list) and ``instruction``; with both a text
    and images, the images come first. A list holds texts and images in their
    order, each as above or as a dict with one of ``text`` and ``image``.

    :raises DataError: ``value`` is none of these, or is empty.
    """
    if isinstance(value, Item):
        item = value
    elif isinstance(value, str):
        item = Item(text=value)
    elif isinstance(value, (Path, bytes, PILImage.Image)):
        item = Item(images=(value,))
    elif isinstance(value, dict):
        item = _item_of_dict(value)
    elif isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], dict):
        item = _item_of_dict(value[0])
    elif isinstance(value, (list, tuple)):
        item = Item(parts=[part for entry in value for part in _parts(entry)])
    else:
        raise DataError(
            "An input must be a str, a PIL image, a path, bytes, a dict or a list of these, but is of type"
            f" `{type(value).__name__}`."
        )

    if not item.parts:
        raise DataError("An input has neither a text nor an image.")

    for part in item.parts:
        if isinstance(part, Text):
            _check_text(part.value)
    return item


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError("A text has half of a surrogate pair, which is not a character.") from None


def _item_of_dict(value: dict[str, object]) -> Item:
    if unknown := sorted(set(value) - {"text", "image", "instruction"}):
        raise DataError(f"An input has unknown keys: {', '.join(map(str, unknown))}. Known: text, image, instruction.")

    text, image, instruction = value.get("text"), value.get("image"), value.get("instruction")
    if not isinstance(text, (str, type(None))) or not isinstance(instruction, (str, type(None))):
        raise DataError("`text` and `instruction` of an input must be of type `str`.")

    images = image if isinstance(image, (list, tuple)) else [] if image is None else [image]
    return Item(text=text, images=tuple(_image_source(i) for i in images), instruction=instruction)


def _parts(entry: object) -> tuple[Part, ...]:
    if isinstance(entry, (Text, Image)):
        return (entry,)
    if isinstance(entry, (list, tuple)):
        raise DataError("An input must not hold a list within a list.")

    item = as_item(entry)
    if item.instruction is not None or (item.text is not None and item.images):
        raise DataError("Each part of an input must be one text or image, without an instruction.")

    return item.parts


def _image_source(value: object) -> ImageSource:
    if isinstance(value, str):
        return value if "://" in value else Path(value)
    if isinstance(value, (Path, bytes, PILImage.Image)):
        return value
    raise DataError(f"An image must be a path, bytes or a PIL image, but is of type `{type(value).__name__}`.")

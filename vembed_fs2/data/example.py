"""A row of data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

ImageSource: TypeAlias = Union[Path, bytes, "PILImage", str]
"""A file, an encoded image, a decoded image, or (only where allowed) a URL."""

Role: TypeAlias = Literal["query", "document"]
"""The side of a comparison that an input stands on."""


@dataclass(frozen=True)
class Text:
    """A text in an input."""

    value: str


@dataclass(frozen=True)
class Image:
    """An image in an input."""

    source: ImageSource


Part: TypeAlias = Text | Image


@dataclass(frozen=True, init=False)
class Item:
    """One input of an encoder: texts and images, in their order."""

    parts: tuple[Part, ...]

    instruction: str | None
    """What the embedding is for; put before the text as the model's template says."""

    source: str = field(compare=False)
    """The place it comes from, as ``file:line``, if errors would not name it otherwise."""

    def __init__(
        self,
        text: str | None = None,
        images: Iterable[ImageSource] = (),
        instruction: str | None = None,
        source: str = "",
        *,
        parts: Iterable[Part] | None = None,
    ) -> None:
        """
        :param text: a text that stands after the images, which is where vision-language models expect it.
        :param parts: texts and images in another order, instead of ``text`` and ``images``.
        """
        if parts is None:
            parts = [*map(Image, images), *([] if text is None else [Text(text)])]
        elif text is not None or images:
            raise ValueError("`parts` must not be given together with `text` or `images`.")

        for name, value in (("parts", tuple(parts)), ("instruction", instruction), ("source", source)):
            object.__setattr__(self, name, value)

    @property
    def text(self) -> str | None:
        """The text; several are joined by line breaks. ``None`` if there is none."""
        texts = [part.value for part in self.parts if isinstance(part, Text)]
        return "\n".join(texts) if texts else None

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """The images, in their order."""
        return tuple(part.source for part in self.parts if isinstance(part, Image))

    @property
    def is_interleaved(self) -> bool:
        """Whether the order counts: there are several texts, or a text between images."""
        kinds = [type(part) for part in self.parts]
        return kinds.count(Text) > 1 or (Text in kinds[1:-1] and Image in kinds)

    def describe_order(self) -> str:
        """Name the parts in their order: "text, image, text"."""
        return ", ".join("text" if isinstance(part, Text) else "image" for part in self.parts)

    def order_error(self, model: str) -> str:
        """Return the error of a model that encodes texts and images apart, and so does not see their order.

        :param model: what messages call it, at the beginning of a sentence.
        """
        if not self.images:
            return f"{model} reads one text per input, but an input has {len(self.parts)}."
        return (
            f"{model} encodes texts and images apart, so it cannot read them in the order {self.describe_order()}."
            " Give one text, before or after the images."
        )


@dataclass(frozen=True)
class Example:
    """One row: a query with what it should, and should not, be close to."""

    query: Item
    positive: Item | None = None
    negatives: tuple[Item, ...] = ()
    label: str | None = None
    """The class of the row; rows of one class are never each other's negatives."""

    scores: tuple[float, ...] = ()
    """Scores of the positive and then of each negative, from a teacher or a human."""

    source: str = field(default="", compare=False)
    """Where the row comes from, as ``file:line``."""

    @property
    def items(self) -> tuple[Item, ...]:
        """The query, the positive if there is one, and the negatives."""
        return (self.query, *(() if self.positive is None else (self.positive,)), *self.negatives)

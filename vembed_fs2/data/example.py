"""A row of data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = Union[Path, bytes, "Image", str]
"""A file, an encoded image, a decoded image, or (only where allowed) a URL."""


@dataclass(frozen=True)
class Item:
    """One input of an encoder: a text, images, or both."""

    text: str | None = None
    images: tuple[ImageSource, ...] = ()
    instruction: str | None = None
    """What the embedding is for; put before the text as the model's template says."""

    source: str = field(default="", compare=False)
    """Where it comes from, as ``file:line``, where errors would not say so otherwise."""


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

"""What callers hand to an :class:`~vembed_fs2.inference.embedder.Embedder`, as items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from vembed_fs2.data.example import Item
from vembed_fs2.errors import DataError
from vembed_fs2.processing.processor import as_item

_ONE_INPUT: Final = (str, bytes, dict, Item, Path)
"""Inputs that are not several, although one can iterate over most of them."""

_IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def as_several(inputs: object) -> Iterable[object] | None:
    """Return the inputs one by one; ``None`` if ``inputs`` is a single input.

    Arrow's arrays become Python's values.

    :raises DataError: it is a table, of which one can iterate over the columns only.
    """
    values: Any = inputs
    if isinstance(values, (list, tuple)):
        return values

    # The tables of pandas, polars and Arrow have this attribute. Iterating over one gives columns, or their names.
    if hasattr(values, "columns"):
        names = getattr(values, "column_names", values.columns)
        known = ", ".join(repr(str(name)) for name in list(names)[:10])
        raise DataError(f"`inputs` is a table with the columns {known}: give one of its columns.")

    if isinstance(values, _ONE_INPUT) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        return None

    return values.to_pylist() if hasattr(values, "to_pylist") else values


def as_items(values: Iterable[object]) -> Iterator[Item]:
    """Convert inputs one by one.

    :raises DataError: one cannot be an input; the message names its position.
    """
    for position, value in enumerate(values):
        try:
            item = as_item(value)
        except DataError as ex:
            raise DataError(f"Input {position}: {ex}") from None

        # What a model cannot take is found later, and the error must name the position then as well.
        is_plain = len(item.parts) == 1 and not item.images
        yield item if is_plain or item.source else replace(item, source=f"Input {position}")


def as_single(value: object) -> Item:
    """Convert a single input; a NumPy array without dimensions holds one."""
    return as_item(value.item() if getattr(value, "ndim", None) == 0 else value)  # type: ignore[attr-defined]


def names_image(item: Item) -> bool:
    """Whether a text is the path of an image that exists."""
    text = item.text
    if text is None or item.images or not text.lower().endswith(_IMAGE_SUFFIXES):
        return False

    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # Too long for a path, or with a null character.
        return False

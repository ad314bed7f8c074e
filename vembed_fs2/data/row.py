"""Reading the values of one raw row."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final, NoReturn

from vembed_fs2.data.example import Image, ImageSource, Item, Part, Text
from vembed_fs2.data.json_text import RepeatedKeyError, parse_json

_INTEGER_AS_FLOAT: Final = re.compile(r"(0|-?[1-9][0-9]*)\.0+")

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """Which column of a row holds which field. Most files have one layout for all rows."""

    columns: dict[str, str]
    """Field -> column."""

    numbered: tuple[tuple[str | None, str | None], ...]
    """The text and the image column of each numbered negative."""


class RowError(Exception):
    """An error in a row, without the row's place."""


def fail(key: str, problem: str) -> NoReturn:
    raise RowError(f"{key!r} {problem}.")


@dataclass(frozen=True)
class RowReader:
    """One raw row, while it is read."""

    values: Mapping[str, object]
    layout: Layout
    root: str
    allow_urls: bool
    untyped: bool

    def name(self, field: str) -> str:
        """The name that the row has for a field."""
        return self.layout.columns.get(field, field)

    def value(self, column: str | None) -> object:
        value = self.values.get(column) if column is not None else None
        return None if (self.untyped and value == "") or is_missing(value) else value

    def field(self, field: str) -> object:
        return self.value(self.layout.columns.get(field))

    def fail_missing(self, field: str, more: str = "") -> NoReturn:
        name = self.name(field)
        if name in self.values:
            fail(name, f"is empty, and there is no image{more} either")

        columns = ", ".join(map(repr, self.values))
        raise RowError(
            f"has no {field}{more}. Its columns are {columns}; `columns` can say which of them is {field!r}."
        )

    def item(self, text_field: str, image_field: str, instruction: str | None) -> Item | None:
        names = (self.name(text_field), self.name(image_field))
        return self._item(self.field(text_field), self.field(image_field), names, instruction)

    def _item(self, value: object, image: object, names: tuple[str, str], instruction: str | None) -> Item | None:
        """Make an item of a text (or the general form) and of images."""
        images = self._images(image, names[1])

        if self.untyped and isinstance(value, str):
            value = _read_parts(value, names[0])

        if isinstance(value, list):
            if not value:
                fail(names[0], "is an empty list")
            if len(value) > 1 and any(isinstance(entry, Mapping) for entry in value):
                if images:
                    fail(names[1], f"must not be given when {names[0]!r} is a list of texts and images")
                return Item(parts=self._parts(value, names[0]), instruction=instruction)

            if len(value) != 1:
                fail(names[0], f"must be one value, but is a list of {len(value)}; write one row for each")

            value = value[0]

        text: str | None = None

        if isinstance(value, Mapping):
            _check_keys(value, ("text", "image", "instruction"), names[0])

            inner = self._images(value.get("image"), names[0])
            if inner and images:
                fail(names[1], f"must not be given when {names[0]!r} has an image itself")

            images = images or inner
            instruction = _instruction(value.get("instruction"), names[0]) or instruction
            value = value.get("text")

        if value is not None:
            text = _text(value, names[0])

        return Item(text, images, instruction) if text is not None or images else None

    def _parts(self, entries: list[object], key: str) -> Iterator[Part]:
        """Read an interleaved input: ``[{"text": ...}, {"image": ...}, ...]``."""
        for idx, entry in enumerate(entries):
            where = f"{key}[{idx}]"
            if isinstance(entry, str):
                yield Text(_text(entry, where))
                continue
            if not isinstance(entry, Mapping):
                fail(where, f"must be a text, or an object with a text or an image, but is {_describe(entry)}")

            _check_keys(entry, ("text", "image"), where)

            # Columnar files write the keys that an entry does not have as null.
            held = [name for name in ("text", "image") if not is_missing(entry.get(name))]
            if len(held) != 1:
                fail(where, f"must hold either a text or an image, but holds {' and '.join(held) or 'neither'}")

            if held == ["text"]:
                yield Text(_text(entry["text"], where))
            else:
                yield from map(Image, self._images(entry["image"], where))

    def positives(self, instruction: str | None) -> list[Item]:
        """The documents that the query should find."""
        several = self._several_positives()
        if several is None:
            item = self.item("positive", "positive_image", instruction)
            return [] if item is None else [item]

        name, entries = several
        image_name = self.name("positive_image")
        if self.field("positive_image") is not None:
            fail(image_name, f"must not be given when {name!r} is a list of positives")

        items = []
        for idx, entry in enumerate(entries):
            item = self._item(entry, None, (f"{name}[{idx}]", image_name), instruction)
            if item is None:
                fail(name, f"has nothing as entry {idx + 1}")
            items.append(item)
        return items

    def count_positives(self) -> int:
        """The number of positives, if there are several; 1 if not."""
        several = self._several_positives()
        return 1 if several is None else len(several[1])

    def _several_positives(self) -> tuple[str, list[object]] | None:
        """The list of positives, and its name, if the row has one."""
        name, other = self.name("positives"), self.name("positive")
        listed, value = self._list(self.field("positives"), name), self.field("positive")
        if listed:
            if value is not None:
                fail(name, f"must not be given together with {other!r}")
            return name, listed

        if self.untyped and isinstance(value, str):
            texts = _read_texts(value)
            return None if texts is None else (other, texts)

        # A list with an object is one positive, of texts and images in their order.
        if isinstance(value, list) and len(value) > 1 and not any(isinstance(entry, Mapping) for entry in value):
            return other, value
        return None

    def negatives(self, instruction: str | None) -> tuple[Item, ...]:
        names = (self.name("negatives"), self.name("negative_images"))
        texts = self._list(self.field("negatives"), names[0])
        images = self._list(self.field("negative_images"), names[1])
        if texts and images and len(texts) != len(images):
            fail(names[1], f"has {len(images)} entries, but {names[0]!r} has {len(texts)}")

        items = []
        for i in range(max(len(texts), len(images))):
            text, image = texts[i] if texts else None, images[i] if images else None

            item = self._item(text, image, names, instruction)
            if item is None:
                fail(names[0] if texts else names[1], f"has nothing as entry {i + 1}")
            items.append(item)

        for text_key, image_key in self.layout.numbered:
            names = (text_key or "", image_key or "")
            item = self._item(self.value(text_key), self.value(image_key), names, instruction)
            if item is not None:  # Tables fill up rows that have fewer negatives.
                items.append(item)

        return tuple(items)

    def _list(self, value: object, key: str) -> list[object]:
        if self.untyped and isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = parse_json(value)
            except RepeatedKeyError as ex:
                fail(key, f"is not valid JSON: {ex}")
            except ValueError:
                fail(key, "starts like a list, but is not valid JSON")

        if value is None:
            return []

        return value if isinstance(value, list) else [value]

    def _images(self, value: object, key: str) -> tuple[ImageSource, ...]:
        return () if is_missing(value) else tuple(self._image(v, key) for v in self._list(value, key))

    def _image(self, value: object, key: str) -> ImageSource:
        if isinstance(value, Mapping):
            _check_keys(value, ("bytes", "path"), key)
            value = value.get("bytes") or value.get("path")

        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value.strip():
            fail(key, f"must be the path of an image (or its bytes), but is {_describe(value)}")

        if _URL.match(value):
            if not self.allow_urls:
                fail(key, f"is the URL {value}; URLs are only fetched with allow_urls=true")
            if not value.lower().startswith(("http://", "https://")):
                fail(key, f"is the URL {value}; only HTTP and HTTPS are supported")
            return value

        return self._file(value, key)

    def _file(self, path: str, key: str) -> Path:
        if "\0" in path:
            fail(key, f"is not a path: {path!r}")

        file = os.path.realpath(os.path.join(self.root, path))
        if not file.startswith(self.root.rstrip(os.sep) + os.sep):
            fail(key, f"is {path}, which lies outside of the image folder {self.root}; set image_root")
        if not os.path.isfile(file):
            fail(key, f"is {path}, but there is no file {file}")

        return Path(file)

    def instruction(self, field: str) -> str | None:
        return _instruction(self.field(field), self.name(field))

    def label(self) -> str | None:
        return read_label(self.field("label"), self.name("label"), untyped=self.untyped)

    def scores(self, positives: Sequence[Item], negatives: Sequence[Item]) -> list[tuple[float, ...]]:
        """For each positive its score and those of the negatives; none if the row has no scores."""
        scores, key = self._scores("scores"), self.name("scores")

        apart = {"positive_scores": ("positive", positives), "negative_scores": ("negative", negatives)}
        found = {field: self._scores(field) for field in apart}
        if not any(found.values()) or any(documents and not found[f] for f, (_, documents) in apart.items()):
            return self._joint_scores(scores, key, positives, negatives)  # Scores of one kind alone compare nothing.

        for field, (kind, documents) in apart.items():
            if scores:
                fail(self.name(field), f"must not be given together with {key!r}")
            if len(found[field]) != len(documents):
                held = f"but has {len(found[field])}"
                fail(self.name(field), f"must have {len(documents)} entries, one for each {kind}, {held}")

        return [(score, *found["negative_scores"]) for score in found["positive_scores"]]

    def _joint_scores(
        self, scores: tuple[float, ...], key: str, positives: Sequence[Item], negatives: Sequence[Item]
    ) -> list[tuple[float, ...]]:
        count = 1 + len(negatives)

        if scores and not positives:
            fail(key, "scores the positive, but the row has none")
        if scores and len(positives) > 1:
            fail(
                key, f"scores one positive, but the row has {len(positives)}: give positive_scores and negative_scores"
            )
        if scores and len(scores) != count:
            fail(key, f"must have {count} entries, for the positive and each negative, but has {len(scores)}")

        return [scores] * max(len(positives), 1)

    def _scores(self, field: str) -> tuple[float, ...]:
        key = self.name(field)
        return tuple(self._score(value, key) for value in self._list(self.field(field), key))

    def _score(self, value: object, key: str) -> float:
        number = math.nan
        if isinstance(value, (int, float)) or (self.untyped and isinstance(value, str)):
            with suppress(ValueError, OverflowError):
                number = float(value)

        if isinstance(value, bool) or not math.isfinite(number):
            fail(key, f"must hold finite numbers, but holds {_describe(value)}")

        return number


def is_missing(value: object) -> bool:
    """Whether there is no value; an image without bytes and path is one that Parquet files write for none."""
    if isinstance(value, Mapping):
        return len(value) > 0 and value.keys() <= {"bytes", "path"} and all(v is None for v in value.values())
    return value is None


def read_label(value: object, key: str, *, untyped: bool) -> str | None:
    """Return the class that a row is of.

    Tables turn integers that have gaps into floats: 1 and 1.0 are one class, in files of strings as well. A number and
    its digits as a string are one class, too, but "01" is another string.

    :raises RowError: it is neither a string, nor an integer, nor a boolean.
    """
    if isinstance(value, float) and math.isnan(value):
        return None  # A gap.
    if isinstance(value, (float, Decimal)) and value == value // 1:
        value = int(value)
    if untyped and isinstance(value, str) and (match := _INTEGER_AS_FLOAT.fullmatch(value)):
        value = match[1]

    if not isinstance(value, (str, int, type(None))):
        fail(key, f"must be a string, an integer or a boolean, but is {_describe(value)}")
    return None if value is None else _text(str(value), key)


def _read_parts(text: str, key: str) -> object:
    """Return the list of texts and images that a file of strings holds as JSON; any other text as it is."""
    if not text.lstrip().startswith("[{"):
        return text
    try:
        values = json.loads(text)
    except ValueError:
        return text

    if not all(isinstance(v, Mapping) and set(v) <= {"text", "image"} for v in values):
        return text
    try:
        return parse_json(text)
    except RepeatedKeyError as ex:
        fail(key, f"is not valid JSON: {ex}")


def _read_texts(text: str) -> list[object] | None:
    """Return the list of texts that a file of strings holds as JSON; ``None`` if it is another text."""
    if not text.startswith('["'):
        return None
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if all(isinstance(v, str) for v in values) else None


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        fail(key, f"must be a text, but is {_describe(value)}")
    if not value or value.isspace():
        fail(key, "is an empty text")

    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        fail(key, "has half of a surrogate pair, which is not a character")

    return value


def _instruction(value: object, key: str) -> str | None:
    return None if value is None or value == "" else _text(value, key)


def _check_keys(value: Mapping[str, object], known: tuple[str, ...], key: str) -> None:
    for name in value:
        if name not in known:
            fail(key, f"has the key {name!r}; known are {', '.join(known)}")


def _describe(value: object) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return f"{value!r}"
    if isinstance(value, (str, bytes)) and not value.strip():
        return "empty"
    return f"{value[:40]!r}" if isinstance(value, str) else f"of type {type(value).__name__}"

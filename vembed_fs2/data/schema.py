"""From a raw row to an :class:`Example`, or to an error that says what is wrong with the row."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from vembed_fs2.data.example import Example, ImageSource, Item, Text
from vembed_fs2.data.row import Layout, RowError, RowReader, fail
from vembed_fs2.errors import ConfigError, DataError, did_you_mean

Mode: TypeAlias = Literal["auto", "t2t", "t2i", "i2i", "i2t", "m2i", "m2t"]
"""What queries and documents consist of: t a text, i images, m both; ``auto`` allows everything."""

MODES: Final[tuple[Mode, ...]] = get_args(Mode)

Columns: TypeAlias = Mapping[str, str | Sequence[str] | None]
"""The column of each field; several columns for several negatives; ``None`` for none."""

FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "query": ("query", "anchor"),
    "query_image": ("query_image", "anchor_image"),
    "positive": ("positive", "pos", "document"),
    "positives": ("positives",),
    "positive_image": ("positive_image", "pos_image", "document_image"),
    "negatives": ("negatives", "negative", "neg"),
    "negative_images": ("negative_images", "negative_image", "neg_image"),
    "label": ("label",),
    "scores": ("scores", "score"),
    "positive_scores": ("positive_scores", "pos_scores"),
    "negative_scores": ("negative_scores", "neg_scores"),
    "instruction": ("instruction",),
    "document_instruction": ("document_instruction",),
}
"""The names under which a row may hold each field. ``negative_1``, ``negative_image_1`` and so on are known as well."""

_NAMES: Final = {name: field for field, names in FIELDS.items() for name in names}

_NEAR: Final = [name for name in _NAMES if name not in FIELDS["positive_scores"] + FIELDS["negative_scores"]]
"""The names that a column is taken for a misspelling of."""

_NUMBERED: Final = re.compile(r"(?:negative|neg)(_image)?_(\d+)")

_PARTS: Final = {"t": "a text and no image", "i": "an image and no text", "m": "an image and a text"}


class RowSchema:
    """Reads rows as :class:`Example`, strictly.

    :param columns: our field -> the file's column, or columns of several negatives; ``None`` leaves the field out.
    :param mode: what queries and documents must consist of.
    :param image_root: the folder that all images must lie in; the folder of the data file by default.
    :param allow_urls: if ``True``, an image may be an HTTP(S) URL.
    :raises ConfigError: an unknown mode or field.
    """

    def __init__(
        self,
        *,
        columns: Columns | None = None,
        mode: str = "auto",
        image_root: str | os.PathLike[str] | None = None,
        allow_urls: bool = False,
    ) -> None:
        self.mode = mode
        self.columns = dict(columns or {})
        self.allow_urls = allow_urls
        self._image_root = None if image_root is None else os.path.expanduser(image_root)
        self._roots: dict[Path, str] = {}
        self._layouts: dict[tuple[str, ...], Layout] = {}

        errors = []
        if mode not in MODES:
            errors.append(f"`mode` must be one of {', '.join(MODES)}, but is {mode!r}.{did_you_mean(mode, MODES)}")

        errors += self._column_errors()
        if self._image_root is not None and not os.path.isdir(self._image_root):
            errors.append(f"`image_root` must be a folder, but {self._image_root} is none.")
        if errors:
            raise ConfigError(errors, where="The data configuration")

    def _column_errors(self) -> Iterator[str]:
        for field, column in self.columns.items():
            if field not in FIELDS and _NUMBERED.fullmatch(field) is None:
                yield f"`columns` maps {field!r}, which is not a field.{did_you_mean(field, FIELDS)}"
            elif not isinstance(column, (str, type(None))) and field not in ("negatives", "negative_images"):
                several = "only 'negatives' and 'negative_images' can have them"
                yield f"`columns` maps {field!r} to several columns; {several}."

    def parse(self, row: Mapping[str, object], where: str, folder: Path, *, untyped: bool = False) -> Example:
        """Read a row that has one positive at most; see :meth:`parse_all`."""
        examples = self.parse_all(row, where, folder, untyped=untyped)
        if len(examples) > 1:
            raise DataError(f"{where}: the row has {len(examples)} positives, but one is expected here.")
        return examples[0]

    def parse_all(
        self, row: Mapping[str, object], where: str, folder: Path, *, untyped: bool = False
    ) -> tuple[Example, ...]:
        """Read a row: an example for each of its positives, or one if it has none.

        :param where: the row's place, for messages.
        :param folder: the folder of the data file.
        :param untyped: if ``True``, the format knows only strings: an empty one means
            that there is no value, and lists are written as JSON.
        :raises DataError: the row cannot be used; the message names place, key and reason.
        """
        try:
            return self._examples(self._reader(row, folder, untyped), where)
        except RowError as ex:
            raise DataError(f"{where}: {ex}") from None

    def count_positives(self, row: Mapping[str, object], folder: Path, *, untyped: bool = False) -> int:
        """The number of examples that :meth:`parse_all` makes of a row; 1 if the row is broken."""
        try:
            return self._reader(row, folder, untyped).count_positives()
        except RowError:
            return 1

    def positive_columns(self) -> list[str]:
        """The columns that may hold a list of positives."""
        mapped = [self.columns.get(field) for field in ("positive", "positives")]
        return [*FIELDS["positive"], *FIELDS["positives"], *(c for c in mapped if isinstance(c, str))]

    def _reader(self, row: Mapping[str, object], folder: Path, untyped: bool) -> RowReader:
        return RowReader(row, self._layout(row), self._root(folder), self.allow_urls, untyped)

    @property
    def label_column(self) -> str | None:
        """The column that holds labels, where a file has it."""
        column = self.columns.get("label", "label")
        return column if isinstance(column, str) else None

    def ignored_columns(self, row: Mapping[str, object]) -> set[str]:
        """The columns of a row that hold no field."""
        try:
            layout = self._layout(row)
        except RowError:
            return set()
        return set(row) - set(layout.columns.values()) - {key for pair in layout.numbered for key in pair if key}

    def _examples(self, row: RowReader, where: str) -> tuple[Example, ...]:
        query = row.item("query", "query_image", row.instruction("instruction"))
        if query is None:
            row.fail_missing("query")

        for_documents = row.instruction("document_instruction")
        positives = row.positives(for_documents)
        negatives = row.negatives(for_documents)

        label = row.label()
        if not positives and label is None:
            row.fail_missing("positive", " and no label")

        self._check_mode(row, query, positives, negatives)
        scores = row.scores(positives, negatives)
        if not positives:
            return (Example(query, None, negatives, label, scores[0], where),)
        return tuple(Example(query, p, negatives, label, own, where) for p, own in zip(positives, scores))

    def _check_mode(self, row: RowReader, query: Item, positives: Sequence[Item], negatives: tuple[Item, ...]) -> None:
        if self.mode == "auto":
            return

        wanted = [(self.mode[0], "query", query)]
        wanted += [(self.mode[2], "positive", positive) for positive in positives]
        wanted += [(self.mode[2], "negatives", negative) for negative in negatives]
        for part, field, item in wanted:
            if (kind := kind_of(item)) != part:
                fail(row.name(field), f"must be {_PARTS[part]} in mode {self.mode}, but is {_PARTS[kind]}")

    def _root(self, folder: Path) -> str:
        if folder not in self._roots:
            self._roots[folder] = os.path.realpath(folder if self._image_root is None else self._image_root)
        return self._roots[folder]

    def _layout(self, row: Mapping[str, object]) -> Layout:
        keys = tuple(row)
        layout = self._layouts.get(keys)
        if layout is None:
            if len(self._layouts) > 1000:
                self._layouts.clear()
            layout = self._layouts[keys] = self._find_columns(keys)

        return layout

    def _find_columns(self, keys: tuple[str, ...]) -> Layout:
        found: dict[str, str] = {}
        numbered: dict[int, list[str | None]] = {}
        mapped = list(self._mapped_columns())
        for field, column in mapped:
            if column not in keys:
                nearest = did_you_mean(column, keys) or " Write null if there is no value."
                raise RowError(f"has no column {column!r}, which `columns` maps to {field!r}.{nearest}")

            if match := _NUMBERED.fullmatch(field):
                numbered.setdefault(int(match[2]), [None, None])[match[1] is not None] = column
            else:
                found[field] = column

        taken = {column for _, column in mapped}
        for key in keys:
            match = _NUMBERED.fullmatch(key)

            name = field_of(key)
            if key in taken or key in self.columns or name in self.columns:
                continue

            if match:
                pair, part = numbered.setdefault(int(match[2]), [None, None]), match[1] is not None
                if pair[part] is not None:
                    fail(key, f"means the same as {pair[part]!r}; leave one of them out")
                pair[part] = key
            elif name is not None:
                if name in found:
                    fail(key, f"means the same as {found[name]!r}; leave one of them out")
                found[name] = key
            elif close := get_close_matches(key, _NEAR, n=1, cutoff=0.86):
                fail(key, f"is no field.{did_you_mean(key, close)} If not, give the column another name")

        # FlagEmbedding's rows, which call the instruction of the query so.
        if "prompt" in keys and "pos" in keys and not {"instruction", "prompt"} & {*found, *self.columns, *taken}:
            found["instruction"] = "prompt"

        return Layout(found, tuple((numbered[n][0], numbered[n][1]) for n in sorted(numbered)))

    def _mapped_columns(self) -> Iterator[tuple[str, str]]:
        """The fields and their columns. Several columns of negatives become numbered fields."""
        for field, column in self.columns.items():
            if isinstance(column, str):
                yield field, column
            elif column is not None:
                prefix = "negative_image" if field == "negative_images" else "negative"
                yield from ((f"{prefix}_{number}", name) for number, name in enumerate(column, start=1))


def field_of(name: str) -> str | None:
    """Return the field that a row holds under a name (``negatives`` for ``neg_1``); ``None`` if it is none."""
    match = _NUMBERED.fullmatch(name)
    return _NAMES.get(f"negative{match[1] or ''}" if match else name)


def kind_of(item: Item) -> Literal["t", "i", "m"]:
    """What an item consists of: ``t`` a text, ``i`` images, ``m`` both."""
    if item.text is None:
        return "i"
    return "m" if item.images else "t"


def content_id(item: Item) -> int:
    """A hash of 63 bits of what an item holds: equal for equal documents, on every rank and in every run.

    An image file counts by its path; its content is not read.
    """
    values: list[bytes] = []
    if item.instruction is not None:
        values += [b"n", item.instruction.encode("utf-8")]

    for part in item.parts:
        if isinstance(part, Text):
            values += [b"t", part.value.encode("utf-8")]
        else:
            values += _image_values(part.source)

    return _hash63(values)


def _image_values(image: ImageSource) -> list[bytes]:
    if isinstance(image, (Path, str)):
        return [b"p", os.fsencode(image)]
    if isinstance(image, bytes):
        return [b"b", image]
    return [b"i", f"{image.mode} {image.size}".encode(), image.tobytes()]


def label_id(label: str | int) -> int:
    """A hash of 63 bits of a label: equal for equal labels, on every rank and in every run."""
    return _hash63([b"l", str(label).encode("utf-8")])


def _hash63(parts: list[bytes]) -> int:
    digest = blake2b(digest_size=8)
    for part in parts:  # With lengths, so that no two lists of parts are the same bytes.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") >> 1

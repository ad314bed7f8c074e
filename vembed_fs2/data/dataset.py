"""Data files as a sequence of examples."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vembed_fs2.data.example import Example
from vembed_fs2.data.row import RowError, read_label
from vembed_fs2.data.schema import Columns, RowSchema, label_id
from vembed_fs2.data.sources import Paths, RowSource
from vembed_fs2.data.usable import DataFacts
from vembed_fs2.errors import ConfigError, DataError

log = logging.getLogger("vembed_fs2")

OnError: TypeAlias = Literal["raise", "skip"]
"""What to do with a row that cannot be used."""

CHECKED_ROWS: Final = 100_000
"""Datasets up to this size are checked when they are opened; it takes seconds."""

_SHOWN: Final = 10

_SAMPLED_ROWS: Final = 1000

_Rows: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"


class ExampleDataset:
    """The examples of one or more data files, read when asked for, by any number of threads.

    A row with a list of positives is an example for each.

    :param paths: a file, a pattern such as ``data/*.jsonl``, a folder of shards, a folder of classes, or several of
        them.
    :param columns: our field -> the file's column (see :class:`RowSchema`).
    :param mode: what queries and documents must consist of.
    :param image_root: the folder that all images must lie in; the folder of the data file by default.
    :param allow_urls: if ``True``, an image may be an HTTP(S) URL.
    :param quoting: of CSV and TSV files: ``rfc4180``, or ``none`` if a quote is a character like any other.
    :param on_error: ``raise``, or ``skip`` to leave out rows that cannot be used.
    :param max_rows: look at the first rows only.
    :param check: if ``True``, reads every row once at opening, so that errors come before
        the training and broken rows are left out for good. By default up to
        100,000 rows; in larger datasets a broken row is found when it is read.
    :param accept: raises ``DataError`` for rows that are sound, but of no use to the caller.
    :raises DataError: a file cannot be read, a checked row cannot be used, or no row is left.
    :raises ConfigError: an unknown mode, field or ``on_error``.
    """

    num_skipped: int
    """The number of rows that were left out at opening."""

    facts: DataFacts | None
    """What the examples hold; ``None`` if they were not read at opening."""

    def __init__(
        self,
        paths: Paths,
        *,
        columns: Columns | None = None,
        mode: str = "auto",
        image_root: str | os.PathLike[str] | None = None,
        allow_urls: bool = False,
        quoting: str = "rfc4180",
        on_error: str = "raise",
        max_rows: int | None = None,
        check: bool | None = None,
        accept: Callable[[Example], None] | None = None,
    ) -> None:
        check_on_error(on_error)

        if max_rows is not None and max_rows < 1:
            raise ConfigError(f"`max_rows` must be positive, but is {max_rows}.", where="The data configuration")

        self._schema = RowSchema(columns=columns, mode=mode, image_root=image_root, allow_urls=allow_urls)
        self._source = RowSource(paths, quoting)
        self._accept = accept
        self._on_error = on_error
        self._labels: NDArray[np.int64] | None = None

        if others := self._source.other_files:
            log.warning(
                "%s files lie beside the images of classes and are not read, such as %s.", len(others), others[0]
            )
        if joined := self._source.find_joined_rows():
            log.warning("%s", joined)

        size = len(self._source) if max_rows is None else min(max_rows, len(self._source))
        self._rows: range | _Rows = range(size)
        self._numbers: _Rows | None = None
        """Which of its row's examples each example is; ``None`` if no row has several."""

        self.num_skipped = 0
        self.facts = None
        if check or (check is None and size <= CHECKED_ROWS):
            self._check(size, on_error)
        else:
            self._count_positives(size)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """Read an example.

        :raises DataError: the row cannot be used; the message names file and line.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")

        index %= len(self)
        row, number = int(self._rows[index]), 0 if self._numbers is None else int(self._numbers[index])
        examples = self._read(row)

        last = index - number + len(examples) - 1
        if last >= len(self) or self._rows[last] != row:  # Its key is written with escapes, for example.
            raise DataError(f"{examples[0].source}: the list of positives was not found when the file was opened.")
        return examples[number]

    def fingerprints(self) -> list[tuple[str, str]]:
        """The path of each file, and a short text that is another one if the file had changed."""
        return self._source.fingerprints()

    def labels(self) -> NDArray[np.int64]:
        """The label of each row as a number (:func:`.schema.label_id`); 0 if it has none. They are read once.

        :raises DataError: a row cannot be read, and ``on_error`` is ``raise``.
        """
        if self._labels is None:
            self._labels = self._read_labels()[self._rows]
        return self._labels

    def has_rows_of_one_side(self) -> bool:
        """Whether there are rows with a label but without a positive. In a large data set, about 1,000 are read."""
        if self.facts is not None:
            return self.facts.num_of_one_side > 0
        step = max(1, len(self) // _SAMPLED_ROWS)
        return any(self._is_of_one_side(row) for row in range(0, len(self), step))

    def _is_of_one_side(self, row: int) -> bool:
        try:
            return self[row].positive is None
        except DataError:
            return False  # Said when the row is used.

    def _read_labels(self) -> NDArray[np.int64]:
        source, column = self._source, self._schema.label_column
        ids = np.zeros(len(source), dtype=np.int64)
        known: dict[str | None, int] = {None: 0}
        for row, value in enumerate(() if column is None else source.column(column)):
            try:
                if isinstance(value, DataError):
                    raise value
                label = read_label(value, column or "", untyped=source.untyped) if value != "" else None
            except (DataError, RowError) as ex:
                if self._on_error == "raise":
                    raise DataError(str(ex) if isinstance(ex, DataError) else f"{source.where(row)}: {ex}") from None
                continue

            if label not in known:
                known[label] = label_id(label or "")
            ids[row] = known[label]

        return ids

    def _read(self, row: int) -> tuple[Example, ...]:
        """Read the examples of a row."""
        source = self._source
        where = source.where(row)

        examples = self._schema.parse_all(source[row], where, source.folder(row), untyped=source.untyped)
        if self._accept is not None:
            for example in examples:
                self._accept(example)
        return examples

    def _check(self, size: int, on_error: str) -> None:
        usable, counts, problems, facts = [], [], Problems(_SHOWN), DataFacts()
        for row in range(size):
            try:
                examples = self._read(row)
            except DataError as ex:
                problems.add(str(ex))
                continue

            usable.append(row)
            counts.append(len(examples))
            for example in examples:
                facts.add(example)

        self.facts = facts

        if max(counts, default=1) > 1 or problems.count:
            self._repeat(np.array(usable, dtype=np.int64), np.array(counts, dtype=np.int64))
        if problems.count == 0:
            return

        summary = f"{problems.count:,} of {size:,} rows cannot be used:\n{problems}"
        if on_error == "raise":
            raise DataError(f"{summary}\nRepair them. A training can leave them out, with `dataset.on_error=skip`.")
        if not usable:
            raise DataError(f"The dataset is empty: {summary}")

        log.warning("%s\nThey are left out.", summary)
        self.num_skipped = problems.count

    def _count_positives(self, size: int) -> None:
        """Find the rows with several positives, without reading the others."""
        several: dict[int, int] = {}
        for row in self._source.rows_with_lists(self._schema.positive_columns()):
            if row >= size:
                continue
            with suppress(DataError):  # Found when the row is read.
                folder, untyped = self._source.folder(row), self._source.untyped
                count = self._schema.count_positives(self._source[row], folder, untyped=untyped)
                if count > 1:
                    several[row] = count

        if several:
            counts = np.ones(size, dtype=np.int64)
            counts[list(several)] = list(several.values())
            self._repeat(np.arange(size), counts)

    def _repeat(self, rows: _Rows, counts: _Rows) -> None:
        """Let each row be as many examples as it has positives."""
        self._rows = np.repeat(rows, counts)
        if counts.max(initial=1) > 1:
            self._numbers = np.arange(len(self._rows)) - np.repeat(np.cumsum(counts) - counts, counts)


class Problems:
    """Counts problems and remembers the first ones; as a string, the list of these."""

    def __init__(self, shown: int) -> None:
        self.count = 0
        self.first: list[str] = []
        self._shown = shown

    def add(self, problem: str) -> None:
        self.count += 1
        if len(self.first) < self._shown:
            self.first.append(problem)

    def __str__(self) -> str:
        lines = [f"  - {problem}" for problem in self.first]
        if self.count > len(self.first):
            lines.append(f"  - and {self.count - len(self.first):,} more")
        return "\n".join(lines)


def check_on_error(on_error: str) -> None:
    """Raise :class:`ConfigError` unless ``on_error`` is ``raise`` or ``skip``."""
    if on_error not in ("raise", "skip"):
        raise ConfigError(f"`on_error` must be 'raise' or 'skip', but is {on_error!r}.", where="The data configuration")

"""Random access to the rows of JSONL, CSV, TSV, JSON, Parquet and Arrow files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from glob import glob, has_magic
from itertools import accumulate, chain
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from vembed_fs2.data.cache import COMPRESSIONS, format_of
from vembed_fs2.data.classes import ClassFolder, has_folders
from vembed_fs2.data.shard import RawRow, Shard
from vembed_fs2.data.text_files import (
    Delimited,
    Descriptor,
    JsonLines,
    JsonList,
    Opener,
    TabDelimited,
    TabUnquoted,
    Unquoted,
)
from vembed_fs2.errors import ConfigError, DataError

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, a pattern such as ``data/*.jsonl``, a folder of shards, a folder of classes, or several of them."""

Quoting: TypeAlias = Literal["rfc4180", "none"]
"""How CSV and TSV files mark fields that hold a separator: by quotes, or not at all."""


_OPEN_FILES: Final = 128


class RowSource:
    """The rows of one or more files, as one sequence.

    Rows are read when they are asked for; any number of threads may ask.

    :param paths: a file, a pattern such as ``data/*.jsonl``, a folder of shards (both taken in the
        order of their names), a folder of classes (:class:`.ClassFolder`), or several of them.
        All must have the same format.
    :param quoting: of CSV and TSV files: ``rfc4180``, or ``none`` if a quote is a character like any other.
    :raises DataError: a file is missing, empty or unreadable, or formats are mixed.
    :raises ConfigError: an unknown ``quoting``.
    """

    files: tuple[Path, ...]
    """The files, in order."""

    untyped: bool
    """True if the format knows only strings (CSV and TSV)."""

    def __init__(self, paths: Paths, quoting: str = "rfc4180") -> None:
        if quoting not in get_args(Quoting):
            raise ConfigError(
                f"`quoting` must be 'rfc4180' or 'none', but is {quoting!r}.", where="The data configuration"
            )

        self.files = _find_files(paths)
        kind = _kind_of(self.files[0])
        self.untyped = kind in (".csv", ".tsv")

        # A bounded number of open files, however many shards there are. A thread
        # that reads holds its own reference, so that eviction cannot close under it.
        opener = lru_cache(_OPEN_FILES)(Descriptor)

        formats = _UNQUOTED_FORMATS if quoting == "none" else _FORMATS
        self._shards = [formats[kind](file, opener) for file in self.files]
        for shard in self._shards:
            if len(shard) == 0:
                raise DataError(f"{shard.file} has no rows.")

        self._ends = list(accumulate(len(s) for s in self._shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> RawRow:
        """Read a row.

        :raises DataError: the row is broken; the message names file and line.
        :raises IndexError: there is no such row.
        """
        shard, row = self._locate(index)
        return shard.read(row)

    def where(self, index: int) -> str:
        """Say where a row is: ``file:line``, or ``file:row N`` where a file has no lines. Both count from 1."""
        shard, row = self._locate(index)
        return shard.where(row)

    def file(self, index: int) -> Path:
        """The file that holds a row."""
        return self._locate(index)[0].file

    def folder(self, index: int) -> Path:
        """The folder that a row's images lie in, if nothing else is said."""
        return self._locate(index)[0].folder

    def column(self, name: str) -> Iterator[object]:
        """Yield a column's value in each row: ``None`` if there is none, an error if the row cannot be read."""
        return chain.from_iterable(shard.column(name) for shard in self._shards)

    @property
    def other_files(self) -> list[str]:
        """Files of folders of classes that hold no row."""
        return [str(shard.file / name) for shard in self._shards for name in shard.other_files]

    def fingerprints(self) -> list[tuple[str, str]]:
        """The path of each file, and a short text that is another one if the file had changed."""
        return [(str(shard.file), shard.fingerprint()) for shard in self._shards]

    def rows_with_lists(self, columns: Sequence[str]) -> Iterator[int]:
        """The rows in which one of these columns may hold a list of several values."""
        for shard, end in zip(self._shards, self._ends):
            yield from (end - len(shard) + row for row in shard.rows_with_lists(columns))

    def find_joined_rows(self) -> str | None:
        """Return a sentence about rows of TSV files that quotes seem to have joined; ``None`` if there are none."""
        found = [(shard, row) for shard in self._shards for row in shard.joined_rows()]
        if not found:
            return None

        shard, row = found[0]
        return (
            f"{shard.where(row)}: a quoted field holds a tab or a line break, so that what looks like several fields or"
            f" rows is one ({len(found):,} in all). If quotes are plain characters in this file, as in MS MARCO's,"
            " set `quoting` to 'none'."
        )

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return self._shards[shard], index - (self._ends[shard - 1] if shard else 0)


def _table(file: Path, _: Opener) -> Shard:
    from vembed_fs2.data.tables import TableShard

    return TableShard(file)


def _class_folder(folder: Path, _: Opener) -> Shard:
    return ClassFolder(folder)


_CLASSES: Final = "a folder of classes"

_FORMATS: Final[dict[str, Callable[[Path, Opener], Shard]]] = {
    ".jsonl": JsonLines,
    ".csv": Delimited,
    ".tsv": TabDelimited,
    ".json": JsonList,
    ".parquet": _table,
    ".arrow": _table,
    _CLASSES: _class_folder,
}

_SUFFIXES: Final = tuple(name for name in _FORMATS if name != _CLASSES)

_UNQUOTED_FORMATS: Final = {**_FORMATS, ".csv": Unquoted, ".tsv": TabUnquoted}

_COMPRESSIBLE: Final = (".jsonl", ".csv", ".tsv", ".json")

_KNOWN: Final = f"{', '.join(_SUFFIXES)}, and {', '.join(_COMPRESSIBLE)} with {' or '.join(COMPRESSIONS)}"


def _find_files(paths: Paths) -> tuple[Path, ...]:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise DataError("No data file is given.")

    files = [file for path in paths for file in _expand(Path(os.path.expanduser(path)))]
    first = files[0]
    for file in files:
        if _kind_of(file) != _kind_of(first):
            raise DataError(f"All files must have the same format, but there are {first} and {file}.")

    return tuple(files)


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _shards_of(path)
    if not path.exists():
        if has_magic(str(path)):
            return _matches_of(path)
        raise DataError(f"{path} does not exist.")
    if not _is_known(path):
        raise DataError(f"{path} has an unknown format; known are {_KNOWN}.")

    return [path]


def _is_known(path: Path) -> bool:
    return format_of(path) in (_COMPRESSIBLE if path.suffix.lower() in COMPRESSIONS else _SUFFIXES)


def _matches_of(pattern: Path) -> list[Path]:
    paths = [Path(match) for match in sorted(glob(str(pattern), recursive=True))]

    # Of the folders that `**` matches, it matches the files as well.
    files = [f for path in paths if not ("**" in pattern.parts and path.is_dir()) for f in _expand(path)]
    if not files:
        raise DataError(f"{pattern} matches no file.")

    return _without_copies(files)


def _shards_of(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as ex:
        raise DataError(f"{folder} cannot be read: {ex.strerror or ex}.") from None

    files = [folder / n for n in names if not n.startswith(".") and _is_known(Path(n))]
    files = [f for f in files if not f.is_dir()]

    # JSON files that lie beside shards of another format describe the dataset.
    files = [f for f in files if format_of(f) != ".json"] or files
    if files:
        return _without_copies(files)
    if has_folders(folder):
        return [folder]

    raise DataError(f"{folder} has no data files ({_KNOWN}), and no folders of images: one for each class.")


def _kind_of(file: Path) -> str:
    return _CLASSES if file.is_dir() else format_of(file)


def _without_copies(files: list[Path]) -> list[Path]:
    """:raises DataError: a file is there as it is and compressed, so that its rows would be read twice."""
    for file in files:
        if file.suffix.lower() in COMPRESSIONS and file.with_suffix("") in files:
            raise DataError(
                f"{file} and {file.with_suffix('')} hold the same rows. Name one of them, or move the other."
            )
    return files

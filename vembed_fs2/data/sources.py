"""Random access to the rows of JSONL, CSV, TSV, JSON, Parquet and Arrow files."""

from __future__ import annotations

import csv
import io
import json
import os
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Final, TypeAlias

from typing_extensions import override

from vembed_fs2.data.classes import ClassFolder, has_folders
from vembed_fs2.data.shard import RawRow, Shard
from vembed_fs2.errors import DataError

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""A file, a folder of shards, a folder of classes, or several of one of these."""


_OPEN_FILES: Final = 128
_BOM: Final = b"\xef\xbb\xbf"


class RowSource:
    """The rows of one or more files, as one sequence.

    Rows are read when they are asked for; any number of threads may ask.

    :param paths: a file, a folder of shards (taken in the order of their names), a
        folder of classes (:class:`.ClassFolder`), or several of them. All must have
        the same format.
    :raises DataError: a file is missing, empty or unreadable, or formats are mixed.
    """

    files: tuple[Path, ...]
    """The files, in order."""

    untyped: bool
    """True if the format knows only strings (CSV and TSV)."""

    def __init__(self, paths: Paths) -> None:
        self.files = _find_files(paths)
        kind = _format_of(self.files[0])
        self.untyped = kind in (".csv", ".tsv")

        # A bounded number of open files, however many shards there are. A thread
        # that reads holds its own reference, so that eviction cannot close under it.
        opener = lru_cache(_OPEN_FILES)(_Descriptor)

        self._shards = [_FORMATS[kind](file, opener) for file in self.files]
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

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        return self._shards[shard], index - (self._ends[shard - 1] if shard else 0)


class _Descriptor:
    """An open file that closes when nothing uses it any more."""

    def __init__(self, file: Path) -> None:
        self._fd = -1
        self._fd = os.open(file, os.O_RDONLY)

    def read(self, start: int, end: int) -> bytes:
        # `pread` has no file position, hence needs no lock.
        parts = []
        while start < end and (part := os.pread(self._fd, end - start, start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


_Opener: TypeAlias = Callable[[Path], _Descriptor]


class _TextShard(Shard):
    """A text file, read through an index of where each record begins."""

    def __init__(self, file: Path, opener: _Opener) -> None:
        super().__init__(file)

        self._opener = opener
        self._starts, lines = array("Q"), array("Q")
        try:
            with file.open("rb") as stream:
                for start, line in self._scan(stream):
                    self._starts.append(start)
                    lines.append(line)
                self._starts.append(stream.tell())
        except OSError as ex:
            raise DataError(f"{file} cannot be read: {ex.strerror or ex}.") from None

        # Most files have one record per line: they need no second index.
        regular = len(lines) > 0 and lines[-1] - lines[0] == len(lines) - 1
        self._lines: Sequence[int] = range(lines[0], lines[-1] + 1) if regular else lines

    @abstractmethod
    def _scan(self, stream: io.BufferedReader) -> Iterator[tuple[int, int]]:
        """Yield the byte offset and the line number of each record; leave ``stream`` at its end."""

    @override
    def __len__(self) -> int:
        return len(self._starts) - 1

    @override
    def _layout(self) -> bytes:
        return self._starts.tobytes()

    @override
    def where(self, row: int) -> str:
        return f"{self.file}:{self._lines[row]}"

    def _text(self, row: int) -> str:
        try:
            data = self._opener(self.file).read(self._starts[row], self._starts[row + 1])
        except OSError as ex:
            raise DataError(f"{self.where(row)}: the file cannot be read: {ex.strerror or ex}.") from None
        return _decode(data, self.where(row))


class _JsonLines(_TextShard):
    @override
    def _scan(self, stream: io.BufferedReader) -> Iterator[tuple[int, int]]:
        start = _skip_bom(stream)
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield start, number
            start += len(line)

    @override
    def read(self, row: int) -> RawRow:
        try:
            value = json.loads(self._text(row).strip())
        except ValueError as ex:
            raise DataError(f"{self.where(row)}: not valid JSON: {_json_problem(ex)}.") from None
        except RecursionError:
            raise DataError(f"{self.where(row)}: the JSON is nested too deeply.") from None

        return _expect_object(value, self.where(row))


class _Delimited(_TextShard):
    """CSV, or TSV with CSV's quoting (RFC 4180; a quoted field may hold newlines)."""

    delimiter = ","

    @override
    def _scan(self, stream: io.BufferedReader) -> Iterator[tuple[int, int]]:
        start = end = _skip_bom(stream)

        def lines() -> Iterator[str]:
            nonlocal end
            for number, line in enumerate(stream, 1):
                end += len(line)
                yield _decode(line, f"{self.file}:{number}")

        reader = self._reader(lines())
        header: list[str] = []
        line = 1
        try:
            for record in reader:
                if not header:
                    header = record
                elif record:
                    yield start, line
                start, line = end, reader.line_num + 1
        except csv.Error as ex:
            raise DataError(f"{self.file}:{line}: not valid {self.file.suffix[1:].upper()}: {ex}.") from None

        self._header = self._check_header(header)

    def _reader(self, lines: Iterator[str]) -> Any:
        # The default limit of 128 KiB is less than a long document.
        csv.field_size_limit(2**31 - 1)
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _check_header(self, header: list[str]) -> list[str]:
        for name in header:
            if not name.strip():
                raise DataError(f"{self.file}: the header has a column without a name.")
            if header.count(name) > 1:
                raise DataError(f"{self.file}: the header names the column {name!r} twice.")
        return header

    @override
    def read(self, row: int) -> RawRow:
        try:
            values = next(self._reader(io.StringIO(self._text(row), newline="\n")))
        except (csv.Error, StopIteration) as ex:
            raise DataError(f"{self.where(row)}: the row cannot be read: {ex}.") from None

        if len(values) != len(self._header):
            raise DataError(
                f"{self.where(row)}: the row has {len(values)} fields, but the header has {len(self._header)}."
            )

        return dict(zip(self._header, values))


class _TabDelimited(_Delimited):
    delimiter = "\t"


class _JsonList(Shard):
    """A JSON file that holds a list of objects; read as a whole."""

    def __init__(self, file: Path, _: _Opener) -> None:
        super().__init__(file)

        try:
            content = file.read_bytes()
            rows = json.loads(_decode(content.removeprefix(_BOM), str(file)))
        except OSError as ex:
            raise DataError(f"{file} cannot be read: {ex.strerror or ex}.") from None
        except ValueError as ex:
            raise DataError(f"{file} is not valid JSON: {ex}. If it has one object per line, name it .jsonl.") from None

        if not isinstance(rows, list):
            raise DataError(f"{file} must hold a list of objects, but holds {_kind(rows)}.")

        self._rows = rows
        self._digest = blake2b(content, digest_size=8).digest()

    @override
    def __len__(self) -> int:
        return len(self._rows)

    @override
    def _layout(self) -> bytes:
        return self._digest

    @override
    def read(self, row: int) -> RawRow:
        return dict(_expect_object(self._rows[row], self.where(row)))


def _table(file: Path, _: _Opener) -> Shard:
    from vembed_fs2.data.tables import TableShard

    return TableShard(file)


def _class_folder(folder: Path, _: _Opener) -> Shard:
    return ClassFolder(folder)


_CLASSES: Final = "a folder of classes"

_FORMATS: Final[dict[str, Callable[[Path, _Opener], Shard]]] = {
    ".jsonl": _JsonLines,
    ".csv": _Delimited,
    ".tsv": _TabDelimited,
    ".json": _JsonList,
    ".parquet": _table,
    ".arrow": _table,
    _CLASSES: _class_folder,
}

_SUFFIXES: Final = tuple(name for name in _FORMATS if name != _CLASSES)


def _find_files(paths: Paths) -> tuple[Path, ...]:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise DataError("No data file is given.")

    files = [file for path in paths for file in _expand(Path(path))]
    first = files[0]
    for file in files:
        if _format_of(file) != _format_of(first):
            raise DataError(f"All files must have the same format, but there are {first} and {file}.")

    return tuple(files)


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _shards_of(path)
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path} has an unknown format; known are {', '.join(_SUFFIXES)}.")

    return [path]


def _shards_of(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as ex:
        raise DataError(f"{folder} cannot be read: {ex.strerror or ex}.") from None

    files = [folder / n for n in names if not n.startswith(".") and Path(n).suffix.lower() in _SUFFIXES]
    files = [f for f in files if not f.is_dir()]

    # JSON files that lie beside shards of another format describe the dataset.
    files = [f for f in files if f.suffix.lower() != ".json"] or files
    if files:
        return files
    if has_folders(folder):
        return [folder]
    raise DataError(
        f"{folder} has no data files ({', '.join(_SUFFIXES)}), and no folders of images: one for each class."
    )


def _format_of(file: Path) -> str:
    return _CLASSES if file.is_dir() else file.suffix.lower()


def _skip_bom(stream: io.BufferedReader) -> int:
    size = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
    stream.seek(size)
    return size


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as ex:
        raise DataError(f"{where}: the text is not UTF-8 ({ex.reason}).") from None


def _json_problem(ex: ValueError) -> str:
    # The decoder counts lines within the record; only the column helps.
    return f"{ex.msg} at column {ex.colno}" if isinstance(ex, json.JSONDecodeError) else str(ex)


def _expect_object(value: object, where: str) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be a JSON object, but is {_kind(value)}.")
    return value


def _kind(value: object) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")

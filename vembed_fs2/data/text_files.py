"""JSONL, CSV, TSV and JSON files, read row by row."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Final, TypeAlias

from typing_extensions import override

from vembed_fs2.data.cache import format_of, unpacked
from vembed_fs2.data.json_text import RepeatedKeyError, find_repeated_key, parse_json
from vembed_fs2.data.shard import RawRow, Shard
from vembed_fs2.errors import DataError

_BOM: Final = b"\xef\xbb\xbf"


class Descriptor:
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


Opener: TypeAlias = Callable[[Path], Descriptor]


class _TextShard(Shard):
    """A text file, read through an index of where each record begins."""

    def __init__(self, file: Path, opener: Opener) -> None:
        super().__init__(file)

        self._opener = opener
        self._content = unpacked(file)
        self._starts, lines = array("Q"), array("Q")
        try:
            with self._content.open("rb") as stream:
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
            data = self._opener(self._content).read(self._starts[row], self._starts[row + 1])
        except OSError as ex:
            raise DataError(f"{self.where(row)}: the file cannot be read: {ex.strerror or ex}.") from None
        return _decode(data, self.where(row))

    def _rows_that_match(self, pattern: bytes) -> Iterator[int]:
        """The rows in which a regular expression matches."""
        with self._content.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            last = -1
            for match in re.finditer(pattern, content):
                row = bisect_right(self._starts, match.start()) - 1
                if last < row < len(self):
                    yield row
                last = max(last, row)


class JsonLines(_TextShard):
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
            value = parse_json(self._text(row).strip())
        except RepeatedKeyError as ex:
            raise DataError(f"{self.where(row)}: {ex}.") from None
        except ValueError as ex:
            raise DataError(f"{self.where(row)}: not valid JSON: {_json_problem(ex)}.") from None
        except RecursionError:
            raise DataError(f"{self.where(row)}: the JSON is nested too deeply.") from None

        return _expect_object(value, self.where(row))

    @override
    def rows_with_lists(self, columns: Sequence[str]) -> Iterable[int]:
        names = {re.escape(json.dumps(c, ensure_ascii=a).encode("utf-8")) for c in columns for a in (True, False)}
        return self._rows_that_match(b"(?:" + b"|".join(sorted(names)) + rb")\s*:\s*\[")


class Delimited(_TextShard):
    """CSV, or TSV with CSV's quoting (RFC 4180; a quoted field may hold newlines)."""

    delimiter = ","

    def __init__(self, file: Path, opener: Opener) -> None:
        self._joined = array("Q")
        super().__init__(file, opener)

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
        count, line = 0, 1
        try:
            for record in reader:
                if not header:
                    header = record
                elif record:
                    if self._is_joined(record, reader.line_num - line):
                        self._joined.append(count)
                    count += 1
                    yield start, line
                start, line = end, reader.line_num + 1
        except csv.Error as ex:
            hint = " If quotes are plain characters in this file, set `quoting` to 'none'." if _is_of_quotes(ex) else ""
            name = format_of(self.file)[1:].upper()
            raise DataError(f"{self.file}:{line}: not valid {name}: {ex}.{hint}") from None

        self._header = self._check_header(header)

    def _reader(self, lines: Iterator[str]) -> Any:
        # The default limit of 128 KiB is less than a long document.
        csv.field_size_limit(2**31 - 1)
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _is_joined(self, record: list[str], more_lines: int) -> bool:
        """Whether a record may be several, or have too few fields: quotes are rare in TSV, and common in CSV."""
        return False

    @override
    def joined_rows(self) -> Sequence[int]:
        return self._joined

    @override
    def rows_with_lists(self, columns: Sequence[str]) -> Iterable[int]:
        return self._rows_that_match(rb'\[\s*"')

    def _check_header(self, header: list[str]) -> list[str]:
        # pandas writes its index as first columns, without a name.
        named = next((i for i, name in enumerate(header) if name.strip()), len(header))
        header = [f"(index {i + 1})" for i in range(named)] + header[named:]
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


class TabDelimited(Delimited):
    delimiter = "\t"

    @override
    def _is_joined(self, record: list[str], more_lines: int) -> bool:
        return more_lines > 0 or any("\t" in value for value in record)


class Unquoted(Delimited):
    """CSV in which a quote is a character like any other: a line is a record."""

    @override
    def _reader(self, lines: Iterator[str]) -> Any:
        return _Lines(lines, self.delimiter)


class TabUnquoted(Unquoted):
    """TSV without quotes, as MS MARCO's files are."""

    delimiter = "\t"


class _Lines:
    """What ``csv.reader`` is for files without quotes."""

    def __init__(self, lines: Iterator[str], delimiter: str) -> None:
        self.line_num = 0
        self._lines = lines
        self._delimiter = delimiter

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        line = next(self._lines).removesuffix("\n").removesuffix("\r")
        self.line_num += 1
        return line.split(self._delimiter) if line else []


class JsonList(Shard):
    """A JSON file that holds a list of objects; read as a whole."""

    def __init__(self, file: Path, _: Opener) -> None:
        super().__init__(file)

        try:
            content = unpacked(file).read_bytes()
        except OSError as ex:
            raise DataError(f"{file} cannot be read: {ex.strerror or ex}.") from None

        text = _decode(content.removeprefix(_BOM), str(file))
        try:
            rows = parse_json(text)
        except RepeatedKeyError as ex:
            line, ex = find_repeated_key(text) or (1, ex)
            raise DataError(f"{file}:{line}: {ex}.") from None
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


def _skip_bom(stream: io.BufferedReader) -> int:
    size = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
    stream.seek(size)
    return size


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as ex:
        raise DataError(f"{where}: the text is not UTF-8 ({ex.reason}).") from None


def _is_of_quotes(ex: csv.Error) -> bool:
    return "expected after" in str(ex) or "unexpected end" in str(ex)


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

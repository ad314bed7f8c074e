"""One file of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias

from vembed_fs2.errors import DataError

RawRow: TypeAlias = dict[str, Any]


class Shard(ABC):
    """One file of a :class:`RowSource`."""

    other_files: Sequence[str] = ()
    """Files that lie where the rows do, but hold none."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> RawRow: ...

    def rows_with_lists(self, columns: Sequence[str]) -> Iterable[int]:
        """The rows in which one of these columns may hold a list of several values."""
        return range(len(self))

    def joined_rows(self) -> Sequence[int]:
        """The rows of which a quoted field holds what separates fields or rows."""
        return ()

    @property
    def folder(self) -> Path:
        """The folder that images lie in, if nothing else is said."""
        return self.file.parent

    def column(self, name: str) -> Iterator[object]:
        """Yield a column's value in each row: ``None`` if there is none, an error if the row cannot be read."""
        for row in range(len(self)):
            try:
                yield self.read(row).get(name)
            except DataError as ex:
                yield ex

    def where(self, row: int) -> str:
        return f"{self.file}:row {row + 1}"

    def fingerprint(self) -> str:
        """A short text that is another one if the file had changed. It does not read the rows again."""
        return f"{self.file.stat().st_size}-{len(self)}-{blake2b(self._layout(), digest_size=8).hexdigest()}"

    def _layout(self) -> bytes:
        """What is known of the rows without reading them, for :meth:`fingerprint`."""
        return b""

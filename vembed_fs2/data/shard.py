"""One file of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeAlias

RawRow: TypeAlias = dict[str, Any]


class Shard(ABC):
    """One file of a :class:`RowSource`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> RawRow: ...

    def where(self, row: int) -> str:
        return f"{self.file}:row {row + 1}"

"""Random access to the rows of Parquet and Arrow files. Needs pyarrow; import it lazily."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from typing_extensions import override

from vembed_fs2.data.cache import cached_copy
from vembed_fs2.data.shard import RawRow, Shard
from vembed_fs2.errors import DataError

IN_MEMORY_BYTES: Final = 2**30
"""Parquet files that are larger than this when decoded are copied to an Arrow file, which is memory-mapped."""


class TableShard(Shard):
    """A Parquet file, or an Arrow IPC file (as Hugging Face datasets' ``save_to_disk`` writes them)."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)

        try:
            self._batches = _open_parquet(file) if file.suffix.lower() == ".parquet" else _open_arrow(file)
        except (pa.ArrowException, OSError) as ex:
            reason = str(ex).splitlines()[0] if str(ex) else type(ex).__name__
            raise DataError(f"{file} is not a readable {file.suffix[1:].capitalize()} file: {reason}") from None

        if self._batches and (name := _repeated_name(self._batches[0].schema)):
            raise DataError(f"{file} has the column {name!r} twice.")

        self._ends = list(accumulate(b.num_rows for b in self._batches))

    @override
    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @override
    def _layout(self) -> bytes:
        return repr(self._ends).encode()

    @override
    def rows_with_lists(self, columns: Sequence[str]) -> Iterable[int]:
        start = 0
        for batch in self._batches:
            lists = [
                batch.column(c) for c in columns if c in batch.schema.names and _is_list(batch.schema.field(c).type)
            ]
            for lengths in map(pc.list_value_length, lists):
                yield from (
                    start + int(i) for i in pc.fill_null(pc.greater(lengths, 1), False).to_numpy(False).nonzero()[0]
                )
            start += batch.num_rows

    def column(self, name: str) -> Iterator[object]:
        for batch in self._batches:
            if name in batch.schema.names:
                yield from batch.column(name).to_pylist()
            else:
                yield from (None for _ in range(batch.num_rows))

    @override
    def read(self, row: int) -> RawRow:
        index = bisect_right(self._ends, row)
        start = self._ends[index - 1] if index else 0
        try:
            rows: list[RawRow] = self._batches[index].slice(row - start, 1).to_pylist()
        except (pa.ArrowException, UnicodeDecodeError) as ex:
            raise DataError(f"{self.where(row)}: the row cannot be read: {ex}.") from None

        return rows[0]


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _open_arrow(file: Path) -> list[Any]:
    memory = pa.memory_map(str(file))
    try:
        reader = pa.ipc.open_file(memory)
    except pa.ArrowInvalid:
        memory.seek(0)
        return [b for b in pa.ipc.open_stream(memory) if b.num_rows]

    return [b for b in map(reader.get_batch, range(reader.num_record_batches)) if b.num_rows]


def _open_parquet(file: Path) -> list[Any]:
    with pq.ParquetFile(file, memory_map=True) as parquet:
        meta = parquet.metadata

        size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        if size > IN_MEMORY_BYTES:
            # Its row groups allow no random access.
            return _open_arrow(cached_copy(file, "arrow", ".arrow", partial(_copy, parquet)))
        return [b for b in parquet.iter_batches() if b.num_rows]


def _copy(parquet: pq.ParquetFile, target: Path) -> None:
    with pa.ipc.new_file(str(target), parquet.schema_arrow) as writer:
        for batch in parquet.iter_batches(batch_size=1024):
            writer.write_batch(batch)


def _repeated_name(fields: Iterable[Any], path: str = "") -> str | None:
    """Return the name of a column, or of a field of a struct, that is there twice."""
    seen = set()
    for field in fields:
        name = f"{path}{field.name}"
        if name in seen:
            return name
        seen.add(name)

        kind = field.type
        while hasattr(kind, "value_type"):  # Lists, however deep.
            kind = kind.value_type
        if pa.types.is_struct(kind) and (inner := _repeated_name(kind, f"{name}.")):
            return inner

    return None

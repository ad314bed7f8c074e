"""Random access to the rows of Parquet and Arrow files. Needs pyarrow; import it lazily."""

from __future__ import annotations

import fcntl
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

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

        self._ends = list(accumulate(b.num_rows for b in self._batches))

    @override
    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @override
    def _layout(self) -> bytes:
        return repr(self._ends).encode()

    @override
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
            return _open_arrow(_copy(parquet, file))
        return [b for b in parquet.iter_batches() if b.num_rows]


def _copy(parquet: pq.ParquetFile, file: Path) -> Path:
    """Decode a Parquet file once per machine: its row groups allow no random access."""
    target = _cache_file(file)
    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                with pa.ipc.new_file(str(temporary), parquet.schema_arrow) as writer:
                    for batch in parquet.iter_batches(batch_size=1024):
                        writer.write_batch(batch)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    return target


def _cache_file(file: Path) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vembed_fs2" / "arrow"
    folder.mkdir(parents=True, exist_ok=True)
    stat = file.stat()
    key = f"{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    return folder / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.arrow"


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    # All ranks of a machine open the same data at the same time.
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

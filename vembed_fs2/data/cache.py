"""Files that are made of data files once per machine, because these allow no random access."""

from __future__ import annotations

import fcntl
import gzip
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from vembed_fs2.errors import DataError

COMPRESSIONS: Final = (".gz", ".zst")
"""The suffixes of compressed files."""


def format_of(file: Path) -> str:
    """Return the suffix that says what a file holds: ``.jsonl`` of ``rows.jsonl`` and of ``rows.jsonl.gz``."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in COMPRESSIONS else suffix


def unpacked(file: Path) -> Path:
    """Return the file with the content of a compressed one; any other file as it is.

    :raises DataError: the file is broken, or there is no room for its content.
    """
    if file.suffix.lower() not in COMPRESSIONS:
        return file

    try:
        return cached_copy(file, "unpacked", format_of(file), partial(_decompress, file))
    except (OSError, EOFError, zlib.error) as ex:
        reason = getattr(ex, "strerror", None) or ex
        raise DataError(f"{file} cannot be unpacked: {reason}.") from None


def cached_copy(file: Path, folder: str, suffix: str, write: Callable[[Path], None]) -> Path:
    """Return what ``write`` makes of a file, in the user's cache. It is made again if the file has changed.

    :param folder: the name of the folder in the cache.
    :param write: writes the file that it is given.
    """
    stat = file.stat()
    key = f"{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"

    target = cache_folder() / folder / f"{blake2b(key.encode(), digest_size=16).hexdigest()}{suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)

    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                write(temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

    return target


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/vembed_fs2``, or ``~/.cache/vembed_fs2``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vembed_fs2"


def _decompress(file: Path, target: Path) -> None:
    with _open_compressed(file) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 2**20)


def _open_compressed(file: Path) -> Any:
    if file.suffix.lower() == ".gz":
        return gzip.open(file)

    import pyarrow as pa

    return pa.input_stream(str(file), compression="zstd")


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    # All ranks of a machine open the same data at the same time.
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield

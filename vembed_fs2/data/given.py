"""Rows that are given as objects, written to a file once: a run has a record of them, and is resumed with the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from filecmp import cmp
from hashlib import blake2b
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, Final, NoReturn

from PIL import Image as PILImage

from vembed_fs2.data.dataset import OnError
from vembed_fs2.data.decode import decode_image
from vembed_fs2.data.schema import Columns, field_of
from vembed_fs2.errors import DataError

_PNG_MODES: Final = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")

_KINDS: Final = "files, an iterable of dicts, or a table of pandas, polars, Arrow or datasets"


def as_paths(data: object) -> list[Path] | None:
    """Return the files that ``data`` names; ``None`` if it holds rows itself."""
    if isinstance(data, (str, os.PathLike)):
        return [Path(data).expanduser()]
    if isinstance(data, (list, tuple)) and data and all(isinstance(entry, (str, os.PathLike)) for entry in data):
        return [Path(entry).expanduser() for entry in data]
    return None


def write_rows(
    rows: object,
    folder: Path,
    name: str,
    *,
    columns: Columns | None = None,
    image_root: Path | None = None,
    on_error: OnError = "raise",
    replace: bool = True,
) -> Path:
    """Write rows to a file, which appears complete or not at all.

    Rows become JSONL; each of their images becomes a file beside it, once
    however many rows have it. A table whose images are bytes already becomes
    Parquet. If the file is there with the same rows, it is left as it is.

    :param rows: an iterable of dicts with the fields of a row, or a table of pandas, polars, Arrow or Hugging Face
        ``datasets``. An image may be a PIL image, the bytes of a file, or a path.
    :param name: of the file, without its suffix.
    :param columns: see :class:`~vembed_fs2.data.schema.RowSchema`.
    :param image_root: the folder that images must lie in whose paths are texts; the working folder by default. A
        ``Path`` may lead anywhere: it does not come from data.
    :param on_error: ``skip`` leaves the path of an image that cannot be copied as it is: the reader leaves such a row
        out, and counts it.
    :param replace: whether a file with other rows is replaced.
    :returns: the file.
    :raises DataError: there is no row, one cannot be written (the message has its number, which begins at 1), or the
        file holds other rows.
    """
    table, given = _open(rows)
    folder.mkdir(parents=True, exist_ok=True)

    if table is not None and _holds_no_paths(table, columns or {}):
        return _settle(folder / f"{name}.parquet", lambda file: _write_table(table, file), _same_tables, replace)

    writer = _RowWriter(folder / "images", image_root or Path.cwd(), columns or {}, on_error)
    return _settle(folder / f"{name}.jsonl", lambda file: writer.write(given, file), _same_files, replace)


def _settle(file: Path, write: Callable[[Path], None], same: Callable[[Path, Path], bool], replace: bool) -> Path:
    """Let ``write`` write a file, and put it to its place unless one with the same content is there."""
    others = [other for other in file.parent.glob(f"{file.stem}.*") if other != file]
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.tmp")
    try:
        write(temporary)
        if file.exists() and not others and same(file, temporary):
            return file

        if not replace and (others or file.exists()):
            raise DataError(
                f"{(others or [file])[0]} holds other rows than these, and a run is resumed with those that it began"
                " with. Give the same rows, or a new folder."
            )

        temporary.replace(file)
        for other in others:
            other.unlink()
    finally:
        temporary.unlink(missing_ok=True)

    return file


def _same_files(left: Path, right: Path) -> bool:
    return cmp(left, right, shallow=False)


def _open(rows: Any) -> tuple[Any, Iterable[Any]]:
    """Return a table of Arrow (``None`` if there is none), and its rows.

    :raises DataError: it is neither rows nor a table.
    """
    if isinstance(rows, Mapping):
        names = ", ".join(map(repr, list(rows)[:5]))
        raise DataError(f"The data must be {_KINDS}, but is a dict of {names}. Give one of its values, or rows.")

    package = type(rows).__module__.partition(".")[0]
    if package == "datasets" and hasattr(rows, "with_format") and hasattr(rows, "__len__"):
        return _with_rows(rows.with_format("arrow")[:])
    if package == "pandas" and hasattr(rows, "columns"):
        return _open_pandas(rows)
    if hasattr(rows, "schema") and (hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__")):
        import pyarrow as pa

        return _with_rows(pa.table(rows))

    if isinstance(rows, (bytes, bytearray)) or not isinstance(rows, Iterable):
        raise DataError(f"The data must be {_KINDS}, but is of type `{type(rows).__name__}`.")
    return None, rows


def _open_pandas(frame: Any) -> tuple[Any, Iterable[Any]]:
    import pyarrow as pa

    try:
        return _with_rows(pa.Table.from_pandas(frame, preserve_index=False))
    except (pa.ArrowException, TypeError):
        # Arrow cannot hold images of PIL, nor columns of values of several kinds.
        return None, frame.astype(object).where(frame.notna(), None).to_dict("records")


def _with_rows(table: Any) -> tuple[Any, Iterable[Any]]:
    return table, chain.from_iterable(batch.to_pylist() for batch in table.to_batches(max_chunksize=1024))


def _holds_no_paths(table: Any, columns: Columns) -> bool:
    """Whether no value of a table of Arrow can be the path of an image."""
    import pyarrow.compute as pc
    import pyarrow.types as kinds

    for name, column in zip(table.column_names, table.columns):
        if "image" not in _field_of(name, columns):
            if "image" in str(column.type):  # Texts and images in one column.
                return False
        elif kinds.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            lacks_bytes = pc.and_(pc.is_valid(column), pc.is_null(pc.struct_field(column, "bytes")))
            if pc.any(lacks_bytes).as_py():
                return False
        elif not kinds.is_binary(column.type) and not kinds.is_large_binary(column.type):
            return False

    return True


def _field_of(name: str, columns: Columns) -> str:
    """Return the field that a column holds; empty if it holds none."""
    for field, column in columns.items():
        if column == name or (column is not None and not isinstance(column, str) and name in column):
            return field
    return field_of(name) or ""


def _write_table(table: Any, file: Path) -> None:
    import pyarrow.parquet as pq

    if table.num_rows == 0:
        raise DataError("The data has no rows.")
    pq.write_table(table, file)


def _same_tables(left: Path, right: Path) -> bool:
    import pyarrow.parquet as pq

    return bool(pq.read_table(left).equals(pq.read_table(right)))


class _RowWriter:
    """Writes rows as JSONL, and their images to a folder."""

    def __init__(self, folder: Path, root: Path, columns: Columns, on_error: OnError) -> None:
        self._folder = folder
        self._root = root.resolve()
        self._columns = columns
        self._on_error = on_error
        self._copies: dict[Path, str] = {}

    def write(self, rows: Iterable[object], file: Path) -> None:
        number = 0
        with file.open("w", encoding="utf-8", errors="surrogatepass") as stream:
            for number, row in enumerate(rows, 1):
                stream.write(self._line(row, f"Row {number}"))

        if number == 0:
            raise DataError("The data has no rows.")

    def _line(self, row: object, where: str) -> str:
        if not isinstance(row, Mapping):
            raise DataError(f"{where} must be a dict, but is of type `{type(row).__name__}`.")
        try:
            values = {str(name): self._value(str(name), value) for name, value in row.items()}
            return json.dumps(values, ensure_ascii=False, default=_refuse) + "\n"
        except (DataError, OSError, ValueError) as ex:
            raise DataError(f"{where}: {ex}") from None

    def _value(self, name: str, value: object) -> Any:
        field = _field_of(name, self._columns)
        if not field:  # The name is kept, because it may be misspelt.
            return value if isinstance(value, (str, int, float)) else None
        return self._plain(value, "image" in field)

    def _plain(self, value: Any, is_image: bool) -> Any:
        """Return a value as JSON can hold it.

        :param is_image: whether a text is the path of an image.
        """
        if isinstance(value, Mapping):
            if is_image and value.keys() <= {"bytes", "path"}:
                content = value.get("bytes")
                return self._plain(value.get("path") if content is None else content, True)
            return {str(key): self._plain(v, is_image or key == "image") for key, v in value.items()}

        if isinstance(value, (list, tuple)):
            return [self._plain(v, is_image) for v in value]

        if isinstance(value, (PILImage.Image, bytes, Path)):
            path = self._keep(value)
            return path if is_image else {"image": path}
        if isinstance(value, str):
            return self._copy(value) if is_image and "://" not in value else value

        # Scalars and arrays of NumPy become Python's.
        return self._plain(value.tolist(), is_image) if hasattr(value, "tolist") else value

    def _copy(self, path: str) -> str:
        try:
            file = (self._root / path).resolve()
            if file.is_relative_to(self._root):
                return self._keep(file)
            raise DataError(
                f"the image {path} lies outside of the folder {self._root}; set `dataset.image_root`, or give a `Path`."
            )
        except (DataError, OSError, ValueError):
            if self._on_error == "skip":
                return path
            raise

    def _keep(self, image: PILImage.Image | bytes | Path) -> str:
        """Write an image to the folder, under a name that its content gives it. *Returns:* its path in the rows."""
        if isinstance(image, Path):
            known = self._copies.get(image)
            if known is None:
                if not image.is_file():
                    raise DataError(f"there is no file {image}.")
                known = self._copies[image] = self._write(image.read_bytes(), image.suffix.lower())
            return known

        return self._write(_encode(image), ".png") if isinstance(image, PILImage.Image) else self._write(image, "")

    def _write(self, content: bytes, suffix: str) -> str:
        file = self._folder / f"{blake2b(content, digest_size=16).hexdigest()}{suffix}"
        if not file.exists():
            self._folder.mkdir(exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content)
            temporary.replace(file)
        return f"{self._folder.name}/{file.name}"


def _encode(image: PILImage.Image) -> bytes:
    image = decode_image(image)  # Upright: the file has no note of its orientation.
    stream = BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(stream, "PNG")
    return stream.getvalue()


def _refuse(value: object) -> NoReturn:
    raise DataError(f"a value of type `{type(value).__name__}` cannot be part of a row.")

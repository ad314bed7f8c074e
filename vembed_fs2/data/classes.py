"""Folders of classes: each image, or each text, is a row whose label is the folder that it lies in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final

from typing_extensions import override

from vembed_fs2.data.shard import RawRow, Shard
from vembed_fs2.errors import DataError

IMAGE_SUFFIXES: Final = frozenset(
    (
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)

TEXT_SUFFIX: Final = ".txt"


class ClassFolder(Shard):
    """A folder of folders of images: ``train/cat/1.png`` is a row of the label ``cat``, in the order of the names.

    A label is the path of the image's folder, so folders may be nested. Hidden files and folders are
    ignored. A folder without images may hold texts in files ``.txt`` instead; beside images, these are no rows.

    :raises DataError: there are neither images nor texts in folders of their own.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)

        try:
            files = list(_walk(folder, "", {os.path.realpath(folder)}))
        except OSError as ex:
            raise DataError(f"{ex.filename} cannot be read: {ex.strerror or ex}.") from None

        images = [name for name in files if _suffix(name) in IMAGE_SUFFIXES and "/" in name]
        texts = [name for name in files if _suffix(name) == TEXT_SUFFIX and "/" in name]
        self._is_text = not images
        self._names = images or texts
        if not self._names:
            raise DataError(
                f"{folder} has no data files, and no folders of classes: images, or texts as .txt, must lie in a"
                " folder for each class."
            )

        used = set(self._names)
        self.other_files = [name for name in files if name not in used]

    @property
    @override
    def folder(self) -> Path:
        return self.file

    @override
    def __len__(self) -> int:
        return len(self._names)

    @override
    def read(self, row: int) -> RawRow:
        name = self._names[row]
        if not self._is_text:
            return {"query_image": str(self.file.absolute() / name), "label": _label(name)}

        try:
            text = (self.file / name).read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            raise DataError(f"{self.where(row)}: the text is not UTF-8.") from None
        except OSError as ex:
            raise DataError(f"{self.where(row)}: the file cannot be read: {ex.strerror or ex}.") from None

        return {"query": text, "label": _label(name)}

    @override
    def column(self, name: str) -> Iterator[object]:
        return map(_label, self._names) if name == "label" else super().column(name)

    @override
    def where(self, row: int) -> str:
        return str(self.file / self._names[row])

    @override
    def fingerprint(self) -> str:
        digest = blake2b("\0".join(self._names).encode("utf-8", "surrogateescape"), digest_size=8)
        return f"{len(self)}-{digest.hexdigest()}"


def has_folders(folder: Path) -> bool:
    """Whether a folder holds others that are not hidden."""
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)


def _walk(folder: Path, prefix: str, above: set[str]) -> Iterator[str]:
    """Yield the paths of all files below a folder, in the order of their names.

    :param above: the folders that this one lies in, so that links in a circle come to an end.
    """
    with os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))

    for name, is_folder in found:
        if not is_folder:
            yield prefix + name
            continue

        real = os.path.realpath(folder / name)
        if real not in above:
            yield from _walk(folder / name, f"{prefix}{name}/", above | {real})


def _label(name: str) -> str:
    return name.rpartition("/")[0]


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()

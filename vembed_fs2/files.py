"""Files that appear complete or not at all, and JSON with errors that name the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vembed_fs2.errors import ModelLoadError, VembedError


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    :raises ModelLoadError: the file cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as ex:
        raise ModelLoadError(f"{file} cannot be read: {ex.strerror or ex}.") from None
    except ValueError as ex:
        raise ModelLoadError(f"{file} is not valid JSON: {ex}.") from None

    if not isinstance(content, dict):
        raise ModelLoadError(f"{file} must hold a JSON object.")

    return content


def write_text(file: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(file: Path, content: object) -> None:
    """Write JSON that appears complete or not at all."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_file(file: Path) -> None:
    """Check that a file can be written, or written anew.

    :raises VembedError: ``file`` is a folder, or there is no folder to put it in.
    """
    if file.is_dir():
        raise VembedError(f"{file} is a folder. Give a file.")
    if not file.parent.is_dir():
        raise VembedError(f"{file} cannot be written: there is no folder {file.parent}.")


def check_new_folder(path: Path) -> None:
    """Check that a folder can be written without overwriting anything.

    :raises VembedError: ``path`` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise VembedError(f"{path} exists and is not empty. Give another folder, or delete it.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes ``path`` when the block ends without an error, and is deleted otherwise.

    :raises VembedError: ``path`` exists and is not an empty folder, or tensors cannot be written.
    """
    from safetensors import SafetensorError

    check_new_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)

    try:
        yield temporary

        # Some writers make files private; these are as open as the folder.
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)

        if path.exists():
            path.rmdir()

        temporary.rename(path)
    except SafetensorError as ex:  # A full disk raises it as well; it is not an `OSError`.
        raise VembedError(f"{path} cannot be written: {ex}.") from ex
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

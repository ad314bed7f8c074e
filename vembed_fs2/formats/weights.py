"""The weight files of a folder: their tensors by name, loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any, Final, final
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json

WEIGHT_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The files in which transformers' layout has its weights, the preferred one first.

A whole file comes before an index, as in transformers, whose ``save_pretrained`` leaves an old index behind.
"""


@final
class LazyTensors(Mapping[str, Tensor]):
    """The tensors of weight files. Each is loaded when it is asked for, and not kept.

    They are views of the mapped files; so they take memory of their own only when they are changed.
    """

    def __init__(self, file: Path) -> None:
        """
        :param file: a weight file, or the index of several.
        :raises ModelLoadError: a file is missing or broken.
        """
        self._load: dict[str, Callable[[], Tensor]] = {}

        files = [file]
        if file.name.endswith(".index.json"):
            files = [file.with_name(name) for name in sorted(set(_read_index(file).values()))]
        for shard in files:
            self.add(shard, lambda key: key)

    def add(self, file: Path, rename: Callable[[str], str]) -> None:
        """Add the tensors of one more file.

        :param rename: returns the name that a tensor has here.
        """
        for key, load in _open_weights(file).items():
            self._load[rename(key)] = load

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self._load[name]()

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    @override
    def __len__(self) -> int:
        return len(self._load)


def find_weights(folder: Path, names: Sequence[str] = WEIGHT_FILES) -> Path:
    """Return the file that holds the weights of a folder, or names the files that do.

    :raises ModelLoadError: there is none.
    """
    for name in names:
        if folder.joinpath(name).is_file():
            return folder / name
    raise ModelLoadError(f"{folder} has no weights: none of {', '.join(names)} is there.")


def _read_index(file: Path) -> dict[str, str]:
    """The file of each tensor."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{file} has no `weight_map`.")

    for name in weight_map.values():
        if not isinstance(name, str) or PurePath(name).name != name:
            raise ModelLoadError(f"{file} must name files in its own folder, but names {name!r}.")

    return weight_map


class _open_errors:
    """Turns the errors of a broken weight file into one that names the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            # safetensors reports every file that it cannot open as missing.
            error = _why_not_opened(self._file) or error

        if isinstance(error, FileNotFoundError):
            raise ModelLoadError(f"{self._file} does not exist.") from None
        if isinstance(error, PermissionError):
            raise ModelLoadError(f"{self._file} cannot be read: permission denied.") from None
        if isinstance(error, (SafetensorError, OSError, RuntimeError, UnpicklingError, EOFError)):
            raise ModelLoadError(f"{self._file} is broken or truncated: {error}.") from None


def _why_not_opened(file: Path) -> OSError | None:
    try:
        with file.open("rb"):
            return None
    except OSError as ex:
        return ex


def _open_weights(file: Path) -> dict[str, Callable[[], Tensor]]:
    """What loads each tensor of a file."""
    if file.suffix == ".safetensors":
        with _open_errors(file):
            opened: Any = safe_open(file, framework="pt")
            names: list[str] = opened.keys()
            return {key: _loader(file, opened, key) for key in names}

    # Pickled tensors only: arbitrary objects in a checkpoint are refused.
    with _open_errors(file):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))

    # open_clip's training saves the state of its optimizer with the model, and the name of DDP's module.
    if isinstance(state, dict) and isinstance(inner := state.get("state_dict"), dict):
        state = {str(key).removeprefix("module."): tensor for key, tensor in inner.items()}
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ModelLoadError(f"{file} must hold tensors by name.")

    return {key: partial(_same, tensor) for key, tensor in state.items()}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _loader(file: Path, opened: Any, key: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with _open_errors(file):
            tensor: Tensor = opened.get_tensor(key)
            return tensor

    return load


def _can_be_mapped(file: Path) -> bool:
    """Whether a pickled file can be mapped: versions of torch before 1.6 wrote another format."""
    try:
        return is_zipfile(file)
    except OSError:
        return False  # Loading it says why.

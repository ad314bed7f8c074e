"""Reads the weights and the configuration of a Hugging Face, sentence-transformers or open_clip folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any, Final, final

import torch
from fairseq2.model_checkpoint import ModelCheckpointLoader, ModelCheckpointLoadOptions
from fairseq2.model_checkpoint.common import reshard_tensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.image_head import ImageHeadConfig
from vembed_fs2.embedding.model import DenseConfig, HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json
from vembed_fs2.formats.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from vembed_fs2.formats.sentence_transformers import SentenceModules, find_clip, read_modules

HEAD_FILE: Final = "vembed_head.json"
"""What follows the backbone, in a folder of transformers' layout that we wrote."""

IMAGE_HEAD_FILE: Final = "vembed_image_head.json"
"""What follows an image backbone, in such a folder."""

_WEIGHT_FILES: Final = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


_OPEN_CLIP_WEIGHT_FILES: Final = (
    OPEN_CLIP_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_model.bin",
    "open_clip_pytorch_model.bin",
    # Some repositories have no weights but open_clip's.
    "model.safetensors",
    "pytorch_model.bin",
)


def is_model_folder(path: Path) -> bool:
    """Whether ``path`` is a Hugging Face, sentence-transformers or open_clip folder."""
    return any(path.joinpath(name).is_file() for name in ("config.json", "modules.json", OPEN_CLIP_CONFIG))


def is_open_clip_folder(path: Path) -> bool:
    """Whether the model of ``path`` is in open_clip's layout.

    A folder that holds the model in transformers' layout as well is one of
    transformers. timm writes a ``config.json`` of its own, without ``model_type``.
    """
    if not path.joinpath(OPEN_CLIP_CONFIG).is_file() or path.joinpath("modules.json").is_file():
        return False
    file = path / "config.json"
    return not file.is_file() or "model_type" not in read_json(file)


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model in the layout of transformers, sentence-transformers or open_clip."""

    root: Path
    backbone: Path
    """The folder of the Transformer itself."""

    modules: SentenceModules | None = None
    """What ``modules.json`` says about a text model, in a sentence-transformers folder."""

    is_open_clip: bool = False
    """Whether configuration and weights are those of open_clip."""

    @staticmethod
    def open(path: Path) -> ModelFolder:
        """Open a folder.

        :raises ModelLoadError: ``path`` is not a folder with a model.
        """
        if not path.is_dir():
            raise ModelLoadError(f"{path} is not a folder.")
        if not is_model_folder(path):
            raise ModelLoadError(f"{path} has no config.json: it is not a Hugging Face model folder.")
        if is_open_clip_folder(path):
            return ModelFolder(path, path, is_open_clip=True)
        if not path.joinpath("modules.json").is_file():
            return ModelFolder(path, path)
        if clip := find_clip(path):
            return ModelFolder(path, clip)
        modules = read_modules(path)
        return ModelFolder(path, modules.backbone, modules)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``, or of ``open_clip_config.json``."""
        return read_json(self.backbone / (OPEN_CLIP_CONFIG if self.is_open_clip else "config.json"))

    def head(self) -> HeadConfig | None:
        """What follows the backbone, where the folder says it."""
        if self.modules is not None:
            return self.modules.head
        file = self.root / HEAD_FILE
        if not file.is_file():
            return None
        try:
            values = read_json(file)
            return HeadConfig(**{**values, "dense": [DenseConfig(**d) for d in values.get("dense", ())]})
        except TypeError as ex:
            raise ModelLoadError(f"{file} is not valid: {ex}.") from None

    def image_head(self) -> ImageHeadConfig | None:
        """What follows an image backbone, where the folder says it."""
        file = self.root / IMAGE_HEAD_FILE
        if not file.is_file():
            return None
        try:
            return ImageHeadConfig(**read_json(file))
        except TypeError as ex:
            raise ModelLoadError(f"{file} is not valid: {ex}.") from None

    @property
    def model_type(self) -> str:
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str):
            raise ModelLoadError(f"{self.backbone / 'config.json'} does not say its `model_type`.")
        return model_type

    def keys(self) -> frozenset[str]:
        """The names of the tensors, where they can be told without loading them; else all of them."""
        file = self._weight_file()
        if file.name.endswith(".index.json"):
            return frozenset(_read_index(file))
        if file.suffix == ".safetensors":
            with _open_errors(file), safe_open(file, framework="pt") as f:
                return frozenset(f.keys())
        return frozenset(_load_weights(file))

    def state_dict(self) -> dict[str, object]:
        """Load all tensors: those of the backbone, and ``head.dense.N.weight|bias`` of dense modules."""
        file = self._weight_file()
        state: dict[str, object] = {}
        shards = [file]
        if file.name.endswith(".index.json"):
            shards = [file.with_name(name) for name in sorted(set(_read_index(file).values()))]
        for shard in shards:
            state.update(_load_weights(shard))
        for idx, folder in enumerate(self.modules.dense_folders if self.modules else ()):
            for key, value in _load_weights(_find_weights(folder)).items():
                state[f"head.dense.{idx}.{key.removeprefix('linear.')}"] = value
        return state

    def _weight_file(self) -> Path:
        return _find_weights(self.backbone, _OPEN_CLIP_WEIGHT_FILES if self.is_open_clip else _WEIGHT_FILES)


def _find_weights(folder: Path, names: Sequence[str] = _WEIGHT_FILES) -> Path:
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
            # safetensors says of every file that it cannot open that it is not there.
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


def _load_weights(file: Path) -> dict[str, Tensor]:
    with _open_errors(file):
        if file.suffix == ".safetensors":
            return load_file(file)
        # Pickled tensors only: arbitrary objects in a checkpoint are refused.
        state = torch.load(file, map_location="cpu", weights_only=True)
    # open_clip's training saves the state of its optimizer with the model, and the name of DDP's module.
    if isinstance(state, dict) and isinstance(inner := state.get("state_dict"), dict):
        state = {str(key).removeprefix("module."): tensor for key, tensor in inner.items()}
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ModelLoadError(f"{file} must hold tensors by name.")
    return state


@final
class FolderCheckpointLoader(ModelCheckpointLoader):
    """Loads Hugging Face and open_clip folders; leaves every other checkpoint to fairseq2's own loader.

    fairseq2 reads ``*.safetensors`` only and knows no sentence-transformers
    layout; this also reads index files, ``.bin`` files and dense modules.
    """

    def __init__(self, fallback: ModelCheckpointLoader) -> None:
        self._fallback = fallback

    @override
    def lazy_load(
        self, path: Path, shard_dims: Mapping[str, int], options: ModelCheckpointLoadOptions | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        options = options or ModelCheckpointLoadOptions()
        if not is_model_folder(path):
            yield from self._load_other(path, shard_dims, options)
            return
        assert options.gangs is not None
        gangs = options.gangs
        state = ModelFolder.open(path).state_dict()
        if options.state_dict_converter is not None:
            state = options.state_dict_converter(state)
        sizes, ranks = (gangs.tp.size, gangs.sdp.size), (gangs.tp.rank, gangs.sdp.rank)
        for key, tensor in state.items():
            assert isinstance(tensor, Tensor)
            yield key, reshard_tensor(key, [[tensor]], (1, 1), sizes, ranks, shard_dims)

    def _load_other(
        self, path: Path, shard_dims: Mapping[str, int], options: ModelCheckpointLoadOptions
    ) -> Iterator[tuple[str, Tensor]]:
        convert = options.state_dict_converter
        if convert is None or not path.joinpath("pp_00").is_dir():
            yield from self._fallback.lazy_load(path, shard_dims, options)
            return
        # The checkpoint of a run. fairseq2 would convert what each rank held and then append it, what is added, too.
        options = replace(options, state_dict_converter=None)
        for key, tensor in convert(dict(self._fallback.lazy_load(path, shard_dims, options))).items():
            assert isinstance(tensor, Tensor)
            yield key, tensor

    @override
    def supports_path(self, path: Path) -> bool:
        return is_model_folder(path) or self._fallback.supports_path(path)

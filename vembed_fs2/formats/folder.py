"""Reads the weights and the configuration of a Hugging Face, sentence-transformers or open_clip folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, final

from fairseq2.model_checkpoint import ModelCheckpointLoader, ModelCheckpointLoadOptions
from fairseq2.model_checkpoint.common import reshard_tensor
from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.image_head import ImageHeadConfig
from vembed_fs2.embedding.model import DenseConfig, HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json
from vembed_fs2.formats.open_clip import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, read_open_clip_json
from vembed_fs2.formats.sentence_transformers import SentenceModules, find_clip, read_modules
from vembed_fs2.formats.weights import WEIGHT_FILES, LazyTensors, find_weights

HEAD_FILE: Final = "vembed_head.json"
"""What follows the backbone, in a folder of transformers' layout that we wrote."""

IMAGE_HEAD_FILE: Final = "vembed_image_head.json"
"""What follows an image backbone, in such a folder."""

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

    @property
    def dialect(self) -> str | None:
        """The library whose format configuration and tensors have; ``None`` if that is transformers."""
        return "open_clip" if self.is_open_clip else None

    @property
    def config_file(self) -> Path:
        return self.backbone / (OPEN_CLIP_CONFIG if self.is_open_clip else "config.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of the configuration file.

        :raises ModelLoadError: it cannot be read.
        """
        if self.is_open_clip:
            read_open_clip_json(self.root)
        return read_json(self.config_file)

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
        """The names of the backbone's tensors."""
        return frozenset(LazyTensors(self._weight_file()))

    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors, each loaded when it is asked for.

        They are those of the backbone, and ``head.dense.N.weight|bias`` of dense modules.
        """
        tensors = LazyTensors(self._weight_file())
        for idx, folder in enumerate(self.modules.dense_folders if self.modules else ()):
            tensors.add(find_weights(folder), partial(_dense_name, idx))
        return tensors

    def state_dict(self) -> dict[str, object]:
        """Load all tensors. See :meth:`tensors`."""
        return dict(self.tensors())

    def _weight_file(self) -> Path:
        return find_weights(self.backbone, _OPEN_CLIP_WEIGHT_FILES if self.is_open_clip else WEIGHT_FILES)


def _dense_name(idx: int, key: str) -> str:
    return f"head.dense.{idx}.{key.removeprefix('linear.')}"


class StateConverter(ABC):
    """Converts the tensors of checkpoints to the names and shapes of a family's."""

    @abstractmethod
    def __call__(self, state_dict: dict[str, object], config: Any) -> dict[str, object]:
        """Convert all tensors at once, as fairseq2's own loaders ask for it."""

    @abstractmethod
    def stream(self, tensors: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, object]]:
        """Convert the tensors of a folder one at a time.

        :param tensors: by their names; each is loaded when it is asked for.
        """


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
        tensors = _convert(ModelFolder.open(path).tensors(), options.state_dict_converter)
        sizes, ranks = (gangs.tp.size, gangs.sdp.size), (gangs.tp.rank, gangs.sdp.rank)
        for key, tensor in tensors:
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


def _convert(
    tensors: Mapping[str, Tensor], convert: Callable[[dict[str, object]], dict[str, object]] | None
) -> Iterator[tuple[str, object]]:
    if convert is None:
        yield from tensors.items()
    # fairseq2 binds the configuration to the family's converter.
    elif isinstance(convert, partial) and isinstance(convert.func, StateConverter):
        yield from convert.func.stream(tensors, **convert.keywords)
    else:
        yield from convert(dict(tensors)).items()

"""Reads the weights and the configuration of a Hugging Face, sentence-transformers or open_clip folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, TypeVar, final

from fairseq2.model_checkpoint import ModelCheckpointLoader, ModelCheckpointLoadOptions
from fairseq2.model_checkpoint.common import reshard_tensor
from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.head import DenseConfig, HeadConfig, ImageHeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json
from vembed_fs2.formats.open_clip import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    read_open_clip_json,
    read_pair,
    read_text_options,
)
from vembed_fs2.formats.registry import find_layout
from vembed_fs2.formats.sentence_transformers import (
    EMPTY_PROMPTS,
    SentenceModules,
    SentenceTowers,
    find_clip,
    read_modules,
)
from vembed_fs2.formats.weights import WEIGHT_FILES, LazyTensors, find_weights

ADAPTER_CONFIG: Final = "adapter_config.json"
"""The file by which peft's adapters are told from models."""

HEAD_FILE: Final = "vembed_head.json"
"""What follows a text backbone, in a folder of transformers' layout that we wrote."""

IMAGE_HEAD_FILE: Final = "vembed_image_head.json"
"""What follows a backbone of images, or of texts and images, in such a folder."""


HeadT = TypeVar("HeadT", bound=HeadConfig)


def is_model_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with a model in a layout that is known."""
    return find_layout(path) is not None


class ModelFolder:
    """A folder with a model in the layout of transformers. Other layouts subclass it."""

    dialect: str | None = None
    """The library whose format configuration and tensors have; ``None`` if that is transformers."""

    config_name: str = "config.json"
    """The file with the model's configuration."""

    modules: SentenceModules | None = None
    """What ``modules.json`` says about a text model."""

    weight_names: Sequence[str] = WEIGHT_FILES
    """The files that may hold the weights, the preferred one first."""

    def __init__(self, root: Path, backbone: Path | None = None) -> None:
        """
        :param backbone: the folder of the model itself; ``root``, if ``None``.
        """
        self.root = root
        self.backbone = backbone or root

    @staticmethod
    def open(path: Path) -> ModelFolder:
        """Open a folder.

        :raises ModelLoadError: ``path`` is not a folder with a model.
        """
        if not path.is_dir():
            raise ModelLoadError(f"{path} is not a folder.")

        if (adapter := path / ADAPTER_CONFIG).is_file():
            raise ModelLoadError(
                f"{adapter} describes an adapter, and adapters are not read. Merge it into its base model (peft's"
                " `merge_and_unload`) and save the result."
            )

        folder = ModelFolder.maybe_open(path)
        if folder is None:
            raise ModelLoadError(f"{path} has no config.json: it is not a Hugging Face model folder.")

        return folder

    @staticmethod
    def maybe_open(path: Path) -> ModelFolder | None:
        """Open a folder; return ``None`` if no model is there."""
        layout = find_layout(path)
        folder: ModelFolder | None = None if layout is None else layout.open(path)
        return folder

    @property
    def config_file(self) -> Path:
        return self.backbone / self.config_name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of the configuration file.

        :raises ModelLoadError: it cannot be read.
        """
        return read_json(self.config_file)

    @property
    def model_type(self) -> str:
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str):
            raise ModelLoadError(f"{self.config_file} does not say its `model_type`.")
        return model_type

    def head(self) -> HeadConfig | None:
        """What follows the backbone, where the folder says it."""
        return _read_head(self.root / HEAD_FILE, HeadConfig)

    def image_head(self) -> ImageHeadConfig | None:
        """What follows a backbone of images, or of texts and images, where the folder says it."""
        return _read_head(self.root / IMAGE_HEAD_FILE, ImageHeadConfig)

    def text_options(self) -> dict[str, Any]:
        """How texts are prepared, prompts included, as fields of ``ProcessorSettings``."""
        return {}

    def truncate_dim(self) -> int | None:
        """The leading dimensions of embeddings that are kept, where the folder says it."""
        return None if self.modules is None else self.modules.truncate_dim

    def image_options(self) -> dict[str, Any] | None:
        """How images are prepared, as ``preprocessor_config.json`` says it; ``None`` if that is a file."""
        return None

    def keys(self) -> frozenset[str]:
        """The names of the backbone's tensors."""
        return frozenset(self._backbone_tensors())

    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors, each loaded when it is asked for."""
        return self._backbone_tensors()

    def state_dict(self) -> dict[str, object]:
        """Load all tensors."""
        return dict(self.tensors())

    def _backbone_tensors(self) -> LazyTensors:
        return LazyTensors(find_weights(self.backbone, self.weight_names))


@final
class SentenceTransformersFolder(ModelFolder):
    """A text model in the layout of sentence-transformers."""

    def __init__(self, root: Path, modules: SentenceModules) -> None:
        super().__init__(root, modules.backbone)
        self.modules: SentenceModules = modules

    @override
    def head(self) -> HeadConfig | None:
        return self.modules.head

    @override
    def text_options(self) -> dict[str, Any]:
        modules = self.modules

        return {
            "max_length": modules.max_length,
            "prompts": {**EMPTY_PROMPTS, **modules.prompts},
            "default_prompt_name": modules.default_prompt_name,
            "do_lower_case": modules.do_lower_case,
            "include_prompt": modules.head.include_prompt,
        }

    @override
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors of the backbone, and ``head.dense.N.weight|bias`` of dense modules."""
        tensors = self._backbone_tensors()
        for idx, folder in enumerate(self.modules.dense_folders):
            tensors.add(find_weights(folder), partial(_dense_name, idx))
        return tensors


@final
class SentenceTowersFolder(ModelFolder):
    """A model of texts and images in transformers' layout, as a module of sentence-transformers."""

    def __init__(self, root: Path, towers: SentenceTowers) -> None:
        super().__init__(root, towers.backbone)
        self._towers = towers

    @override
    def image_head(self) -> ImageHeadConfig:
        towers = self._towers
        return ImageHeadConfig(pooling="pooler", normalize=towers.normalize, similarity=towers.similarity)

    @override
    def truncate_dim(self) -> int | None:
        return self._towers.truncate_dim

    @override
    def text_options(self) -> dict[str, Any]:
        towers = self._towers

        return {
            "max_length": towers.max_length,
            "prompts": {**EMPTY_PROMPTS, **towers.prompts},
            "default_prompt_name": towers.default_prompt_name,
        }


@final
class OpenClipFolder(ModelFolder):
    """A model in the layout of open_clip."""

    dialect = "open_clip"

    config_name = OPEN_CLIP_CONFIG

    weight_names = (
        OPEN_CLIP_WEIGHTS,
        "open_clip_pytorch_model.safetensors",
        "open_clip_model.bin",
        "open_clip_pytorch_model.bin",
        # Some repositories have no weights but open_clip's.
        "model.safetensors",
        "pytorch_model.bin",
    )

    @cached_property
    @override
    def config(self) -> dict[str, Any]:
        model_cfg, preprocess_cfg = read_open_clip_json(self.root)
        return {**read_json(self.config_file), "model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}

    @override
    def text_options(self) -> dict[str, Any]:
        return read_text_options(self.root)

    @override
    def image_options(self) -> dict[str, Any]:
        try:
            size = read_pair(self.config["model_cfg"]["vision_cfg"].get("image_size") or 224, "vision_cfg.image_size")
        except ModelLoadError as ex:
            raise ModelLoadError(f"{self.config_file}: {ex}") from None
        return {"open_clip": {**self.config["preprocess_cfg"], "size": size}}


def is_open_clip_folder(path: Path) -> bool:
    """Whether the model of ``path`` is in open_clip's layout.

    A folder that holds the model in transformers' layout as well is one of
    transformers. timm writes a ``config.json`` of its own, without ``model_type``.
    """
    if not path.joinpath(OPEN_CLIP_CONFIG).is_file() or path.joinpath("modules.json").is_file():
        return False
    file = path / "config.json"
    return not file.is_file() or "model_type" not in read_json(file)


def open_sentence_transformers(path: Path) -> ModelFolder:
    """Open a folder of sentence-transformers: of a text model, or of a model of texts and images."""
    if towers := find_clip(path):
        return SentenceTowersFolder(path, towers)
    return SentenceTransformersFolder(path, read_modules(path))


def _read_head(file: Path, kls: type[HeadT]) -> HeadT | None:
    if not file.is_file():
        return None

    try:
        values = read_json(file)
        return kls(**{**values, "dense": [DenseConfig(**d) for d in values.get("dense", ())]})
    except TypeError as ex:
        raise ModelLoadError(f"{file} is not valid: {ex}.") from None


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

        # A run's checkpoint. fairseq2 converts each rank's shard and concatenates the results, which would repeat
        # tensors that the converter adds; so convert the joined state.
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

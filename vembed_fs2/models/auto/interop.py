"""Checkpoints of any model of transformers, read and written as transformers does."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Final, final

import torch
import transformers
from fairseq2.models import ModelHubAccessor
from fairseq2.models.hg import HuggingFaceConfig
from fairseq2.utils.config import cast_config_type
from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.checkpoint import declare_hf_config
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.formats.rope import create_config
from vembed_fs2.models.auto.backbone import Backbone, find_backbone
from vembed_fs2.models.auto.config import AUTO_FAMILY, AutoModelConfig
from vembed_fs2.models.auto.factory import create_auto_model, default_head, default_image_head
from vembed_fs2.models.auto.model import OWN_PARAMETERS, AutoEmbeddingModel
from vembed_fs2.models.auto.trace import trace_image
from vembed_fs2.models.family import CheckpointFormat

_PREFIX: Final = "wrapped."

_HEAD_KEY: Final = re.compile(r"head\.dense\.[0-9]+\.(weight|bias)")

_STALE_KEY: Final = re.compile(r"(.*\.)?(position|token_type)_ids")
"""Buffers that old versions of transformers saved: 0, 1, 2, ... and zeros."""

_LOADING_FIELDS: Final = ("dtype", "torch_dtype", "transformers_version")

_PRIVATE_FIELDS: Final = ("_out_features", "_out_indices")
"""What holds the fields of the same names in configurations of images."""

log = logging.getLogger("vembed_fs2")


@final
class AutoCheckpointFormat(CheckpointFormat):
    """Reads and writes what ``AutoModel`` does."""

    @override
    def from_folder(self, folder: ModelFolder, *, trust_remote_code: bool = False) -> AutoModelConfig:
        code = folder.backbone if "auto_map" in folder.config else None
        return self._create_config(folder.config, folder.head(), folder.keys(), code, trust_remote_code)

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> AutoModelConfig:
        return self._create_config(hf_config, head, keys, None, False)

    def _create_config(
        self,
        hf_config: Mapping[str, Any],
        head: HeadConfig | None,
        keys: frozenset[str],
        code: Path | None,
        trusted: bool,
    ) -> AutoModelConfig:
        config = AutoModelConfig(
            hf_config=dict(hf_config),
            trust_remote_code=trusted,
            code_path=None if code is None else str(code),
        )
        config.pooler = _has_pooler(config, keys)
        backbone = config.backbone()
        if backbone.modalities == {"text"}:
            config.head = default_head(backbone) if head is None else head
        elif head is not None:
            raise ModelLoadError(
                f"Modules after a {backbone.kls.__name__} are not supported: it has no states of texts."
            )
        elif not backbone.is_dual:
            config.image_head = default_image_head(trace_image(backbone))

        if errors := config.validate().errors:
            raise ModelLoadError(" ".join(map(str, errors)))

        return config

    @override
    def from_hf_state_dict(self, state_dict: dict[str, object], config: AutoModelConfig) -> dict[str, object]:
        backbone = config.backbone()

        if any(key.startswith(_PREFIX) for key in state_dict):
            return state_dict

        own = {k: v for k, v in state_dict.items() if _HEAD_KEY.fullmatch(k) and config.head is not None}

        tensors = {k: v for k, v in state_dict.items() if k not in own}
        tensors = _with_prefix(tensors, backbone)
        try:
            wrapped, info = backbone.load(tensors, _common_dtype(tensors.values()))
        except (RuntimeError, ValueError) as ex:
            raise ModelLoadError(f"The checkpoint does not fit transformers' {backbone.kls.__name__}. {ex}") from ex

        _check_unexpected(info["unexpected_keys"], backbone)

        # Only for the names and shapes that this gives the tensors; they stay where they are, mapped files included.
        model = AutoEmbeddingModel(wrapped, backbone)
        _check_missing(info["missing_keys"], config, model)

        return {**model.state_dict(), **own}

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        backbone = cast_config_type(config, AutoModelConfig).backbone()
        values = vars(backbone.config).items()
        data = {k: v for k, v in values if not k.startswith("_") or k in _PRIVATE_FIELDS}
        kls = type(backbone.config)
        name = declare_hf_config(f"Vembed_{kls.__name__}", kls.model_type, data, kls)

        return HuggingFaceConfig(data, kls_name=name, arch=backbone.kls.__name__)

    @override
    def to_hg_state_dict(self, state_dict: dict[str, object], config: object) -> dict[str, object]:
        backbone = cast_config_type(config, AutoModelConfig).backbone()

        shapes = {name: tensor.shape for name, tensor in backbone.create_empty().state_dict().items()}
        tensors: dict[str, object] = {}
        for key, value in state_dict.items():
            name = key.removeprefix(_PREFIX)
            if "." not in key and name not in shapes:
                continue  # An objective learned it; transformers has no place for it.

            is_scalar = isinstance(value, Tensor) and name in shapes and len(shapes[name]) == 0
            tensors[name] = value.reshape(()) if is_scalar else value  # type: ignore[attr-defined]

        return tensors

    @override
    def find_extra_fields(self, hf_config: Mapping[str, Any], config: object) -> dict[str, object]:
        return {}  # The configuration holds them all.

    @override
    def describe_config(self, config: object) -> dict[str, Any]:
        """Return the content of ``config.json`` as it was."""
        config = cast_config_type(config, AutoModelConfig)
        values = {k: v for k, v in config.hf_config.items() if k not in _LOADING_FIELDS}
        values |= create_config(config.hf_config, type(config.backbone().config))[1]  # Both versions read it.
        return values | {
            "architectures": [config.backbone().kls.__name__],
            "transformers_version": transformers.__version__,
        }

    @override
    def write_files(self, folder: Path, config: object) -> None:
        """Write the model's own code."""
        config = cast_config_type(config, AutoModelConfig)
        for source in Path(config.code_path).glob("*.py") if config.code_path is not None else ():
            shutil.copy(source, folder / source.name)


def _has_pooler(config: AutoModelConfig, keys: frozenset[str]) -> bool | None:
    """Whether a checkpoint has the pooler of its class; ``None`` if there is nothing to have."""
    backbone = find_backbone(config.hf_config, pooler=True, code=config.code())
    if not (keys and backbone.options):
        return None

    names = [name for name in backbone.create_empty().state_dict() if name.startswith("pooler.")]
    return all(any(key.endswith(name) for key in keys) for name in names) if names else None


def _with_prefix(tensors: dict[str, object], backbone: Backbone) -> dict[str, object]:
    """Add what all names of a class start with: version 5 of transformers writes CLIP's towers without it."""
    known = backbone.create_empty().state_dict().keys()
    prefix = next(iter(known), "").partition(".")[0] + "."
    if not all(name.startswith(prefix) for name in known) or any(name.startswith(prefix) for name in tensors):
        return tensors
    return {prefix + name if prefix + name in known else name: tensor for name, tensor in tensors.items()}


def _common_dtype(tensors: Iterable[object]) -> torch.dtype:
    """The type that holds all values exactly."""
    dtypes = {t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()}
    return reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def _check_unexpected(keys: Iterable[str], backbone: Backbone) -> None:
    """Allow what only the head of a pretraining or classification class needs, if that class wrote the checkpoint."""
    keys = [key for key in keys if not _STALE_KEY.fullmatch(key)]
    if not keys:
        return

    of_heads: set[str] = set()
    for name in backbone.config.architectures or ():
        kls = getattr(transformers, name, None)
        if isinstance(kls, type) and issubclass(kls, transformers.PreTrainedModel):
            of_heads |= Backbone(kls, backbone.config, backbone.modalities).create_empty().state_dict().keys()

    if unknown := [key for key in keys if key not in of_heads]:
        raise ModelLoadError(
            f"The checkpoint has tensors that transformers' {backbone.kls.__name__} does not know: {_list(unknown)}."
        )

    log.info("Left out what %s does not have: %s.", backbone.kls.__name__, _list(keys))


def _check_missing(keys: Iterable[str], config: AutoModelConfig, model: AutoEmbeddingModel) -> None:
    """Allow only what no embedding depends on, and buffers that are the same in all models."""
    counted = {name for name, buffer in model.wrapped.named_buffers() if not buffer.is_floating_point()}

    missing = [key for key in keys if key not in counted and key not in OWN_PARAMETERS]
    if missing:
        with torch.device("meta"):
            blank = create_auto_model(config)
        unused = {name for name, parameter in blank.wrapped.named_parameters() if not parameter.requires_grad}
        missing = [key for key in missing if key not in unused]

    if missing:
        kls = type(model.wrapped).__name__
        raise ModelLoadError(f"The checkpoint lacks tensors of transformers' {kls}: {_list(missing)}.")


def _list(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


get_auto_model_hub = ModelHubAccessor(AUTO_FAMILY, kls=AutoEmbeddingModel, config_kls=AutoModelConfig)

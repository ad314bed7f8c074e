"""Checkpoints of open_clip: which family reads one, and what families share in reading them.

A folder of open_clip (https://github.com/mlfoundations/open_clip) holds
``open_clip_config.json`` with ``model_cfg`` and ``preprocess_cfg``, and
``open_clip_model.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from math import log
from pathlib import Path
from typing import Any, Final, Protocol, cast

import torch
from torch import Tensor

from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.files import read_json

OPEN_CLIP_CONFIG: Final = "open_clip_config.json"

OPEN_CLIP_WEIGHTS: Final = "open_clip_model.safetensors"

_MODULES: Final = {
    "vembed_clip": "vembed_fs2.models.clip.open_clip",
    "vembed_eva": "vembed_fs2.models.eva.open_clip",
    "vembed_siglip": "vembed_fs2.models.siglip.open_clip",
}

_MODEL_DEFAULTS: Final = {
    "embed_dim": 0,
    "vision_cfg": {},
    "text_cfg": {},
    "quick_gelu": False,
    "init_logit_scale": log(1 / 0.07),
    "init_logit_bias": None,
    # What follows changes how tensors are named and returned, and no embedding.
    "custom_text": False,
    "nonscalar_logit_scale": False,
    "output_dict": False,
}

BLOCK_OPTIONS: Final = {
    "output_tokens": False,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
"""Options of both Transformers that only their default is supported of."""


class OpenClipFormat(Protocol):
    """How the checkpoints of a family look in open_clip: a module ``open_clip`` with these functions."""

    def config_from_open_clip(self, model_cfg: Mapping[str, Any]) -> Any:
        """Convert ``model_cfg`` to the family's configuration.

        :raises ModelLoadError: an option is not supported; the message names it.
        """

    def state_dict_from_open_clip(self, state: dict[str, object], config: Any) -> dict[str, object]:
        """Convert tensors to the family's names."""

    def config_to_open_clip(self, config: Any) -> dict[str, Any]:
        """Convert the family's configuration to ``model_cfg``.

        :raises VembedError: open_clip cannot express an option; the message names it.
        """

    def state_dict_to_open_clip(self, state: dict[str, object], config: Any) -> dict[str, object]:
        """Convert the family's tensors to open_clip's names."""


def get_open_clip_format(family: str) -> OpenClipFormat:
    """Return how the checkpoints of ``family`` look in open_clip.

    :raises VembedError: open_clip has no such models.
    """
    module = _MODULES.get(family)
    if module is None:
        raise VembedError(f"{family} models have no open_clip format. These have: {', '.join(_MODULES)}.")
    return cast(OpenClipFormat, import_module(module))


def find_open_clip_family(model_cfg: Mapping[str, Any]) -> str:
    """Return the family that reads models of ``model_cfg``.

    :raises ModelLoadError: there is none; the message names the option.
    """
    if "multimodal_cfg" in model_cfg:
        raise ModelLoadError("`multimodal_cfg`: CoCa models are not supported.")
    options = read_model_options(model_cfg)
    text, vision = options["text_cfg"], options["vision_cfg"]
    if name := text.get("hf_model_name"):
        raise ModelLoadError(
            f"`text_cfg.hf_model_name` is '{name}': text towers of transformers in an open_clip checkpoint are not "
            "supported."
        )
    name = vision.get("timm_model_name")
    if not name:
        if isinstance(vision.get("layers"), (list, tuple)):
            raise ModelLoadError("`vision_cfg.layers` is a list: ResNet image towers are not supported.")
        return "vembed_clip"
    if str(name).startswith(("eva_", "eva02_")):
        return "vembed_eva"
    if "_siglip_" in str(name):
        return "vembed_siglip"
    raise ModelLoadError(f"`vision_cfg.timm_model_name` is '{name}', which is not supported.")


def read_open_clip_config(folder: Path) -> tuple[str, Any]:
    """Return the family and the configuration of a model in a folder of open_clip.

    :raises ModelLoadError: ``open_clip_config.json`` is not valid, or not supported.
    """
    model_cfg, _ = read_open_clip_json(folder)
    try:
        family = find_open_clip_family(model_cfg)
        text_cfg = dict(model_cfg["text_cfg"])
        if text_cfg.get("hf_tokenizer_name") and (pad_id := _read_pad_id(folder)) is not None:
            # What texts are padded with is the tokenizer's, whatever `pad_id` says.
            text_cfg["pad_id"] = pad_id
        return family, get_open_clip_format(family).config_from_open_clip({**model_cfg, "text_cfg": text_cfg})
    except ModelLoadError as ex:
        raise ModelLoadError(f"{folder / OPEN_CLIP_CONFIG}: {ex}") from None


def read_open_clip_json(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return ``model_cfg`` and ``preprocess_cfg`` of a folder.

    :raises ModelLoadError: ``open_clip_config.json`` cannot be read.
    """
    file = folder / OPEN_CLIP_CONFIG
    content = read_json(file)
    model_cfg, preprocess_cfg = content.get("model_cfg"), content.get("preprocess_cfg", {})
    if not isinstance(model_cfg, Mapping) or not isinstance(preprocess_cfg, Mapping):
        raise ModelLoadError(f"{file} must hold `model_cfg` and `preprocess_cfg`.")
    for name in ("vision_cfg", "text_cfg"):
        if not isinstance(model_cfg.get(name), Mapping):
            raise ModelLoadError(f"{file}: `{name}` must hold the options of a tower.")
    return model_cfg, preprocess_cfg


def _read_pad_id(folder: Path) -> int | None:
    """The index of the padding token of a Hugging Face tokenizer, where its files say it."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    config = read_json(file)
    name = config.get("pad_token")
    if isinstance(name, dict):
        name = name.get("content")
    for index, token in config.get("added_tokens_decoder", {}).items():
        if token.get("content") == name:
            return int(index)
    return None


def is_open_clip_state(family: str, state: Mapping[str, object]) -> bool:
    """Whether the tensors of a model of ``family`` have the names of open_clip."""
    return family in _MODULES and any(key.startswith("visual.") for key in state)


def read_model_options(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model besides those of its towers, which stay as they are; defaults are filled in.

    :raises ModelLoadError: an option is not known, or of a wrong type.
    """
    options = read_options(model_cfg, "", _MODEL_DEFAULTS)
    for name in ("vision_cfg", "text_cfg"):
        if not options[name]:
            raise ModelLoadError(f"`{name}` must hold the options of a tower.")
    if options["embed_dim"] < 1:
        raise ModelLoadError(f"`embed_dim` must be at least 1, but is {options['embed_dim']} instead.")
    return options


def read_options(
    values: Mapping[str, Any],
    where: str,
    defaults: Mapping[str, Any],
    *,
    fixed: Mapping[str, Any] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Fill in the defaults of options; refuse what is not known.

    :param where: what comes before the names of options in errors: ``text_cfg.``.
    :param defaults: options that are supported. A default of ``None`` allows every type.
    :param fixed: options of which only the default is supported.
    :param ignored: options that open_clip itself does not obey.
    :raises ModelLoadError: an option is not known, not supported or of a wrong type.
    """
    fixed = fixed or {}
    for name, value in values.items():
        if name in fixed:
            # Absent, None and False all turn an option off.
            if (value or None) != (fixed[name] or None):
                raise ModelLoadError(f"`{where}{name}` is {value!r}, which is not supported.")
        elif name not in defaults and name not in ignored:
            raise ModelLoadError(f"`{where}{name}` is not an option that is known.")
    return {name: _read_option(values.get(name, default), default, where + name) for name, default in defaults.items()}


def _read_option(value: Any, default: Any, name: str) -> Any:
    if default is None or type(value) is type(default):
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, dict) and isinstance(value, Mapping):
        return value
    raise ModelLoadError(f"`{name}` must be of type `{type(default).__name__}`, but is {value!r} instead.")


def read_pair(value: object, name: str) -> int | tuple[int, int]:
    """Return height and width; one number, if they are equal.

    :raises ModelLoadError: it is neither one integer nor two.
    """
    sizes: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(sizes) not in (1, 2) or any(type(size) is not int for size in sizes):
        raise ModelLoadError(f"`{name}` must be one integer or two, but is {value!r} instead.")
    height, width = int(sizes[0]), int(sizes[-1])
    return height if height == width else (height, width)


def read_number(value: object, name: str) -> float | None:
    """Return a number that may be absent.

    :raises ModelLoadError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelLoadError(f"`{name}` must be a number, but is {value!r} instead.")
    return float(value)


def read_layer_norm_eps(norm_kwargs: object, name: str) -> float:
    """Return ``eps`` of ``norm_kwargs``.

    :raises ModelLoadError: they hold something else.
    """
    options = _read_kwargs(norm_kwargs, name)
    return float(read_options(options, f"{name}.", {"eps": 1e-5})["eps"])


def read_activation(act_kwargs: object, name: str, *, quick_gelu: bool) -> str:
    """Return the name of an activation function.

    :raises ModelLoadError: ``act_kwargs`` hold something else than the approximation of GELU.
    """
    options = _read_kwargs(act_kwargs, name)
    if quick_gelu:
        read_options(options, f"{name}.", {})
        return "quick_gelu"
    approximation = read_options(options, f"{name}.", {"approximate": "none"})["approximate"]
    if approximation not in ("none", "tanh"):
        raise ModelLoadError(f"`{name}.approximate` must be 'none' or 'tanh', but is '{approximation}' instead.")
    return "gelu_pytorch_tanh" if approximation == "tanh" else "gelu"


def _read_kwargs(value: object, name: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ModelLoadError(f"`{name}` must hold options by name, but is {value!r} instead.")
    return value or {}


def find_mlp_ratio(model_dim: int, inner_dim: int) -> float:
    """Return the factor of ``model_dim`` that makes ``inner_dim``, rounded down as open_clip does."""
    ratio = inner_dim / model_dim
    return ratio if int(model_dim * ratio) == inner_dim else (inner_dim + 0.5) / model_dim


def split_in_proj(state: Mapping[str, object]) -> dict[str, object]:
    """Split the tensors that queries, keys and values share: ``in_proj_weight`` becomes ``q_proj.weight`` etc."""
    result: dict[str, object] = {}
    for key, value in state.items():
        stem, found, name = key.rpartition("in_proj_")
        if not found:
            result[key] = value
            continue
        assert isinstance(value, Tensor)
        for kind, part in zip("qkv", value.chunk(3)):
            result[f"{stem}{kind}_proj.{name}"] = part
    return result


def join_in_proj(state: Mapping[str, object]) -> dict[str, object]:
    """The reverse of :func:`split_in_proj`."""
    result: dict[str, object] = {}
    for key, value in state.items():
        stem, found, name = key.rpartition("q_proj.")
        if found:
            parts = [state[f"{stem}{kind}_proj.{name}"] for kind in "qkv"]
            result[f"{stem}in_proj_{name}"] = torch.cat([part for part in parts if isinstance(part, Tensor)])
        elif not key.rpartition(".")[0].endswith((".k_proj", ".v_proj")):
            result[key] = value
    return result


def reshape_scalars(state: Mapping[str, object], shape: tuple[int, ...]) -> dict[str, object]:
    """Give the temperature and the bias of the logits ``shape``: a scalar in open_clip, and ``[1]`` here."""
    result = dict(state)
    for key in ("logit_scale", "logit_bias"):
        value = result.get(key)
        if isinstance(value, Tensor):
            result[key] = value.reshape(shape)
    return result

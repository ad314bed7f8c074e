"""Checkpoints of open_clip: what a family says of its own, and what families share in reading them.

A folder of open_clip (https://github.com/mlfoundations/open_clip) holds
``open_clip_config.json`` with ``model_cfg`` and ``preprocess_cfg``, and
``open_clip_model.safetensors``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, Final, final

from torch import Tensor
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json
from vembed_fs2.formats.dialect import Dialect
from vembed_fs2.formats.extra_fields import add_extra_fields, find_extra_fields
from vembed_fs2.formats.key_map import KeyMap

OPEN_CLIP_CONFIG: Final = "open_clip_config.json"

OPEN_CLIP_WEIGHTS: Final = "open_clip_model.safetensors"

CLEANINGS: Final = ("lower", "whitespace", "canonicalize")
"""How open_clip cleans texts."""

_KNOWN_FIELDS: Final[Mapping[str, object]] = {
    "model_cfg": {"vision_cfg": {}, "text_cfg": dict.fromkeys(("hf_tokenizer_name", "pad_id", "tokenizer_kwargs"))},
    "preprocess_cfg": dict.fromkeys(("mean", "std", "interpolation", "resize_mode", "fill_color")),
}
"""The fields of a configuration file that are the processor's, and those that hold others."""

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
"""Options of either Transformer for which only the default is supported."""


@final
@dataclass(frozen=True, kw_only=True)
class OpenClipFormat(Dialect):
    """How the checkpoints of a family look in open_clip. ``model_cfg`` is what its files call a configuration."""

    reads: Callable[[Mapping[str, Any]], bool]
    """Whether the family reads models of ``model_cfg``."""

    config_from_open_clip: Callable[[Mapping[str, Any]], Any]
    """
    Converts ``model_cfg`` to the family's configuration.

    :raises ModelLoadError: an option is not supported; the message names it.
    """

    config_to_open_clip: Callable[[Any], dict[str, Any]]
    """
    Converts the family's configuration to ``model_cfg``.

    :raises VembedError: open_clip cannot express an option; the message names it.
    """

    create_key_map: Callable[[Any], KeyMap]
    """Return how open_clip's tensors map to the tensors of a model of this configuration."""

    @override
    def reads_config(self, content: Mapping[str, Any]) -> bool:
        refuse_model(content["model_cfg"])
        return self.reads(content["model_cfg"])

    @override
    def describe(self, content: Mapping[str, Any]) -> str:
        return f"`vision_cfg.timm_model_name` is '{timm_name(content['model_cfg'])}', which is not supported."

    @override
    def from_config(self, folder: Path, content: Mapping[str, Any]) -> Any:
        text_cfg = dict(content["model_cfg"]["text_cfg"])
        if text_cfg.get("hf_tokenizer_name") and (pad_id := _read_pad_id(folder)) is not None:
            # Texts are padded with the tokenizer's token, whatever `pad_id` says.
            text_cfg["pad_id"] = pad_id
        return self.config_from_open_clip({**content["model_cfg"], "text_cfg": text_cfg})

    @override
    def find_extra_fields(self, content: Mapping[str, Any], config: Any) -> dict[str, object]:
        return find_extra_fields(content, {"model_cfg": self.config_to_open_clip(config)}, _KNOWN_FIELDS)

    def add_extra_fields(self, content: Mapping[str, Any], config: Any) -> Mapping[str, Any]:
        """Return a file's content with the extra fields of ``config``, unless these contradict it."""
        extra = getattr(config, "extra_fields", {}).get(OPEN_CLIP_CONFIG)
        if not extra:
            return content

        completed = add_extra_fields(content, extra, _KNOWN_FIELDS)
        try:
            again = self.config_to_open_clip(self.config_from_open_clip(completed["model_cfg"]))
        except ModelLoadError:
            return content

        return completed if again == self.config_to_open_clip(config) else content

    @override
    def has_names(self, keys: Iterable[str]) -> bool:
        return any(key.startswith("visual.") for key in keys)

    @override
    def key_map(self, config: Any) -> KeyMap:
        return self.create_key_map(config)

    def state_dict_from_open_clip(self, state: Mapping[str, Tensor], config: Any) -> dict[str, object]:
        """Convert tensors to the family's names."""
        return dict(self.create_key_map(config).read(state))

    def state_dict_to_open_clip(self, state: Mapping[str, Tensor], config: Any) -> dict[str, object]:
        """Convert the family's tensors to open_clip's names."""
        return dict(self.create_key_map(config).write(state))


def refuse_model(model_cfg: Mapping[str, Any]) -> None:
    """Refuse what no family reads.

    :raises ModelLoadError: the message names the option.
    """
    if "multimodal_cfg" in model_cfg:
        raise ModelLoadError("`multimodal_cfg`: CoCa models are not supported.")

    options = read_model_options(model_cfg)
    if name := options["text_cfg"].get("hf_model_name"):
        raise ModelLoadError(
            f"`text_cfg.hf_model_name` is '{name}': text towers of transformers in an open_clip checkpoint are not "
            "supported."
        )

    vision = options["vision_cfg"]
    if not vision.get("timm_model_name") and isinstance(vision.get("layers"), (list, tuple)):
        raise ModelLoadError("`vision_cfg.layers` is a list: ResNet image towers are not supported.")


def timm_name(model_cfg: Mapping[str, Any]) -> str:
    """Return timm's name of the image tower; empty, if it is open_clip's own."""
    return str(model_cfg["vision_cfg"].get("timm_model_name") or "")


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
    """The index of the padding token of a Hugging Face tokenizer, if its files have it."""
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


def read_text_options(folder: Path) -> dict[str, Any]:
    """Return how the texts of an open_clip folder are tokenized, as fields of ``ProcessorSettings``.

    :raises ModelLoadError: an option is not supported; the message names it.
    """
    model_cfg, _ = read_open_clip_json(folder)

    text_cfg = model_cfg["text_cfg"]
    where = f"{folder / OPEN_CLIP_CONFIG}: `text_cfg."
    if text_cfg.get("tokenizer_mode"):
        raise ModelLoadError(f"{where}tokenizer_mode` is '{text_cfg['tokenizer_mode']}', which is not supported.")

    has_own_tokenizer = bool(text_cfg.get("hf_tokenizer_name"))
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    cleaning = options.pop("clean", "whitespace" if has_own_tokenizer else "lower")
    strip_sep_token = bool(options.pop("strip_sep_token", False)) if has_own_tokenizer else False

    if options:
        raise ModelLoadError(f"{where}tokenizer_kwargs.{min(options)}` is not supported.")
    if cleaning not in CLEANINGS:
        raise ModelLoadError(f"{where}tokenizer_kwargs.clean` is '{cleaning}', which is not supported.")

    return {
        "max_length": text_cfg.get("context_length", 77),
        "text_cleaning": cleaning,
        "strip_sep_token": strip_sep_token,
        "open_clip_bpe": not has_own_tokenizer,
    }


def find_tokenizer_name(folder: Path) -> str | None:
    """Return the repository whose tokenizer a folder of open_clip names; ``None`` if it names none."""
    if not folder.joinpath(OPEN_CLIP_CONFIG).is_file():
        return None
    name: str | None = read_open_clip_json(folder)[0]["text_cfg"].get("hf_tokenizer_name")
    return name


def read_model_options(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model, with defaults filled in. The options of its towers stay as they are.

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

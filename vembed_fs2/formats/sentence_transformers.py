"""Reads the folder layout of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from vembed_fs2.embedding.head import DenseConfig, HeadConfig, Pooling, SingleSimilarity
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json

TRANSFORMER_FILES: Final = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


# Our names of the pooling modes, by theirs.
POOLINGS: Final[dict[str, Pooling]] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "lasttoken": "last",
}


# Before version 5.4 each pooling mode was a key of its own. Several are put one after the other, in this order.
POOLING_KEYS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


EMPTY_PROMPTS: Final = {"query": "", "document": ""}
"""
The prompts that sentence-transformers adds to those of a folder. So neither side
has the default prompt there, and documents never have one called ``passage`` or ``corpus``.
"""


ACTIVATIONS: Final = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "relu": "torch.nn.modules.activation.ReLU",
    "gelu": "torch.nn.modules.activation.GELU",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
}


# Keys of the Transformer module's file that do not change what it computes, or that are read below.
_TRANSFORMER_KEYS: Final = {"max_seq_length", "do_lower_case", "unpad_inputs"}


# Other keys, and the values at which they do not change what it computes.
_TRANSFORMER_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "modality_config": ({"text": {"method": "forward", "method_output_name": "last_hidden_state"}},),
    "processing_kwargs": ({}, None),
}


# The same of models of texts and images, which give embeddings themselves.
_TOWER_VALUES: Final[dict[str, tuple[object, ...]]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("sentence_embedding",),
    "modality_config": tuple(
        {kind: {"method": f"get_{kind}_features", "method_output_name": name} for kind in ("text", "image")}
        for name in ("pooler_output", None)
    ),
    "unpad_inputs": (None, False),
    "do_lower_case": (None, False),
}


# Options for transformers that do not change what it computes; the data type is the user's choice here.
_HARMLESS_OPTIONS: Final = {"torch_dtype", "dtype", "attn_implementation", "trust_remote_code", "low_cpu_mem_usage"}


_OPTION_KEYS: Final = (
    "model_args",
    "model_kwargs",
    "tokenizer_args",
    "processor_kwargs",
    "config_args",
    "config_kwargs",
)


@dataclass(frozen=True)
class SentenceModules:
    """What ``modules.json`` and the files that it names say."""

    backbone: Path
    """The folder with the Transformer's ``config.json`` and weights."""

    head: HeadConfig
    """What follows the backbone."""

    dense_folders: Sequence[Path] = ()
    """The folders of the dense modules, in order, one for each entry of ``head.dense``."""

    max_length: int | None = None
    """The longest text in tokens, if the folder has it."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompt texts by name."""

    default_prompt_name: str | None = None
    """The prompt that is used when none is asked for."""

    do_lower_case: bool = False
    """If ``True``, texts are lowercased before tokenization."""

    truncate_dim: int | None = None
    """The leading dimensions of embeddings that are kept, if the folder says it."""


@dataclass(frozen=True, kw_only=True)
class SentenceTowers:
    """What ``modules.json`` and the files that it names say about a model of texts and images."""

    backbone: Path
    """The folder with its ``config.json`` and weights."""

    normalize: bool
    """Whether a normalisation follows the model."""

    similarity: SingleSimilarity = "cosine"
    """How embeddings are compared."""

    truncate_dim: int | None = None
    """The leading dimensions of embeddings that are kept, if the folder says it."""

    max_length: int | None = None
    """The longest text in tokens, if the folder has it."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompt texts by name."""

    default_prompt_name: str | None = None
    """The prompt that is used when none is asked for."""


def read_modules(root: Path) -> SentenceModules:
    """Read a sentence-transformers folder.

    :raises ModelLoadError: a file is missing or broken, or a module is not supported.
    """
    modules = _list_modules(root)
    kinds = [kind for kind, _ in modules]
    _check_order(root / "modules.json", kinds)
    backbone = modules[0][1]
    dense_folders = tuple(folder for kind, folder in modules if kind == "Dense")
    pooling, include_prompt = _read_pooling(modules[1][1] / "config.json")
    prompts, default_prompt_name, similarity = _read_prompts(root / "config_sentence_transformers.json")
    head = HeadConfig(
        pooling=pooling,
        include_prompt=include_prompt,
        dense=[_read_dense(folder / "config.json") for folder in dense_folders],
        normalize="Normalize" in kinds,
        similarity=similarity,
    )
    max_length, do_lower_case = _read_transformer(backbone)

    return SentenceModules(
        backbone,
        head,
        dense_folders,
        max_length,
        prompts,
        default_prompt_name,
        do_lower_case,
        _read_truncate_dim(root / "config_sentence_transformers.json"),
    )


def find_clip(root: Path) -> SentenceTowers | None:
    """Find a model of texts and images in transformers' layout, if ``modules.json`` names one.

    In older versions of sentence-transformers that is CLIP alone; since 5.4, any such model is a
    Transformer module that gives embeddings.

    :raises ModelLoadError: something else than a normalisation follows the model, or an option is not supported.
    """
    modules = _list_modules(root)

    kinds = [kind for kind, _ in modules]
    if kinds[:1] != ["CLIPModel"] and not (kinds[:1] == ["Transformer"] and _has_two_towers(modules[0][1])):
        return None
    if kinds[1:] not in ([], ["Normalize"]):
        raise ModelLoadError(f"{root / 'modules.json'}: {kinds[1:]} after {kinds[0]} is not supported.")

    backbone = modules[0][1]
    prompts, default, similarity = _read_prompts(root / "config_sentence_transformers.json")
    max_length = _read_tower_options(backbone) if kinds[0] == "Transformer" else None

    return SentenceTowers(
        backbone=backbone,
        normalize="Normalize" in kinds,
        similarity=similarity,
        max_length=max_length,
        prompts=prompts,
        default_prompt_name=default,
        truncate_dim=_read_truncate_dim(root / "config_sentence_transformers.json"),
    )


def _has_two_towers(folder: Path) -> bool:
    """Whether a Transformer module has a method for texts and another one for images."""
    file = _transformer_file(folder)
    modalities = (read_json(file) if file.is_file() else {}).get("modality_config")
    if not isinstance(modalities, Mapping):
        return False
    methods = {kind: value.get("method") for kind, value in modalities.items() if isinstance(value, Mapping)}
    return methods == {"text": "get_text_features", "image": "get_image_features"}


def _read_tower_options(folder: Path) -> int | None:
    """The longest text.

    :raises ModelLoadError: the file asks for something else than what the model's own processor does.
    """
    file = _transformer_file(folder)
    config = read_json(file)
    _check_options(file, config, {"max_seq_length", "processing_kwargs"}, _TOWER_VALUES)

    processing = _read(file, config, "processing_kwargs", dict, {}) if config.get("processing_kwargs") else {}
    _refuse_unknown(file, processing, {"text"}, "processing_kwargs.")
    options = _read(file, processing, "text", dict, {})
    _refuse_unknown(file, options, {"max_length", "padding", "truncation"}, "processing_kwargs.text.")
    if options.get("truncation", True) in (False, "do_not_truncate"):
        raise ModelLoadError(f"{file}: `processing_kwargs.text.truncation` must be true: longer texts have no place.")

    for values, name in ((options, "max_length"), (config, "max_seq_length")):
        if values.get(name) is not None:
            length: int = _read(file, values, name, int)
            return length

    return None


def _check_options(
    file: Path, config: Mapping[str, Any], known: set[str], values: Mapping[str, tuple[object, ...]]
) -> None:
    """Refuse what is not among ``known``, and other values than ``values`` of the rest."""
    _refuse_unknown(file, config, {*known, *values, *_OPTION_KEYS})
    for key, supported in values.items():
        if key in config and config[key] not in supported:
            raise ModelLoadError(f"{file}: `{key}` is {config[key]!r}, which is not supported.")

    for key in _OPTION_KEYS:
        for option in _read(file, config, key, dict, {}):
            if option not in _HARMLESS_OPTIONS:
                raise ModelLoadError(f"{file}: `{key}.{option}` is not supported.")


def _transformer_file(folder: Path) -> Path:
    return next((folder / n for n in TRANSFORMER_FILES if folder.joinpath(n).is_file()), folder / TRANSFORMER_FILES[0])


def _list_modules(root: Path) -> list[tuple[str, Path]]:
    """The class name and the folder of each module."""
    file = root / "modules.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        modules = [(str(e["type"]), str(e["path"])) for e in entries]
    except OSError as ex:
        raise ModelLoadError(f"{file} cannot be read: {ex.strerror or ex}.") from None
    except (ValueError, TypeError, KeyError):
        raise ModelLoadError(f"{file} must hold a JSON list of modules, each with `type` and `path`.") from None

    for kind, path in modules:
        # Two layouts of module paths exist; both end in the same class names.
        if not kind.startswith("sentence_transformers."):
            raise ModelLoadError(f"{file}: module '{kind}' is the model's own code, which is not supported.")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ModelLoadError(f"{file}: `path` must be inside the folder, but is '{path}' instead.")

    return [(kind.rpartition(".")[2], root / path) for kind, path in modules]


def _check_order(file: Path, kinds: list[str]) -> None:
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
            raise ModelLoadError(f"{file}: module '{kind}' is not supported.")

    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ModelLoadError(f"{file}: the first modules must be Transformer and Pooling, but are {kinds[:2]} instead.")

    for kind in ("Transformer", "Pooling"):
        if kinds.count(kind) > 1:
            raise ModelLoadError(f"{file}: more than one {kind} module is not supported.")

    if "Dense" in kinds[kinds.index("Normalize") if "Normalize" in kinds else len(kinds) :]:
        raise ModelLoadError(f"{file}: a Dense module after Normalize is not supported.")


def _read_pooling(file: Path) -> tuple[Pooling | list[Pooling], bool]:
    config = read_json(file)
    known = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *POOLING_KEYS}
    _refuse_unknown(file, config, known)

    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in POOLING_KEYS.items() if config.get(key)] or ["mean"]
    elif isinstance(modes, str):
        modes = [modes]

    for mode in modes:
        if mode not in POOLINGS:
            supported = ", ".join(POOLINGS)
            raise ModelLoadError(f"{file}: `pooling_mode` '{mode}' is not supported. Supported are: {supported}.")

    poolings = [POOLINGS[mode] for mode in modes]
    return poolings[0] if len(poolings) == 1 else poolings, _read(file, config, "include_prompt", bool, True)


def _read_dense(file: Path) -> DenseConfig:
    config = read_json(file)
    known = {"in_features", "out_features", "bias", "activation_function", "module_input_name", "module_output_name"}
    _refuse_unknown(file, config, known)

    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise ModelLoadError(f"{file}: `{key}` '{config[key]}' is not supported: it must be 'sentence_embedding'.")

    path = _read(file, config, "activation_function", str, ACTIVATIONS["tanh"])
    names: dict[str, Any] = {p.rpartition(".")[2]: name for name, p in ACTIVATIONS.items()}
    if not path.startswith("torch.nn.") or path.rpartition(".")[2] not in names:
        supported = ", ".join(ACTIVATIONS.values())
        raise ModelLoadError(f"{file}: `activation_function` '{path}' is not supported. Supported are: {supported}.")

    return DenseConfig(
        input_dim=_read(file, config, "in_features", int),
        output_dim=_read(file, config, "out_features", int),
        bias=_read(file, config, "bias", bool, True),
        activation=names[path.rpartition(".")[2]],
    )


def _read_transformer(folder: Path) -> tuple[int | None, bool]:
    """The longest text and whether texts are lowercased."""
    file = _transformer_file(folder)
    config = read_json(file) if file.is_file() else {}
    _check_options(file, config, _TRANSFORMER_KEYS, _TRANSFORMER_VALUES)

    max_length = None
    if config.get("max_seq_length") is not None:
        max_length = _read(file, config, "max_seq_length", int)

    return max_length or _default_max_length(folder), _read(file, config, "do_lower_case", bool, False)


def _default_max_length(backbone: Path) -> int | None:
    """What the tokenizer and the position table allow."""
    limits = []
    for name, key in (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings")):
        file = backbone / name

        limit = read_json(file).get(key) if file.is_file() else None

        # Tokenizers without a limit say 1e30; XLNet says -1.
        if isinstance(limit, (int, float)) and 0 < limit < 1e9:
            limits.append(int(limit))

    return min(limits, default=None)


def _read_prompts(file: Path) -> tuple[dict[str, str], str | None, SingleSimilarity]:
    """Prompts, the default prompt's name, and the similarity."""
    config = read_json(file) if file.is_file() else {}
    prompts: dict[str, str] = {}
    for name, text in (_read(file, config, "prompts", dict, {}) or {}).items():
        # sentence-transformers writes prompts that are not set as null.
        if text is not None:
            prompts[name] = _read(file, {f"prompts.{name}": text}, f"prompts.{name}", str)

    default = config.get("default_prompt_name")
    if default is not None and default not in {**EMPTY_PROMPTS, **prompts}:
        raise ModelLoadError(f"{file}: `default_prompt_name` is '{default}', but `prompts` has no such prompt.")

    similarity: SingleSimilarity = config.get("similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise ModelLoadError(f"{file}: `similarity_fn_name` '{similarity}' is not supported.")

    return prompts, default, similarity


def _read_truncate_dim(file: Path) -> int | None:
    value = read_json(file).get("truncate_dim") if file.is_file() else None
    if value is not None and (type(value) is not int or value < 1):
        raise ModelLoadError(f"{file}: `truncate_dim` must be a positive integer, but is {value!r} instead.")
    return value


def _refuse_unknown(file: Path, config: Mapping[str, Any], known: set[str], where: str = "") -> None:
    for key in config:
        if key not in known:
            raise ModelLoadError(f"{file}: `{where}{key}` is not supported.")


_REQUIRED: Final = object()


def _read(file: Path, config: Mapping[str, Any], key: str, kls: type, default: object = _REQUIRED) -> Any:
    value = config.get(key, default)
    if value is _REQUIRED:
        raise ModelLoadError(f"{file} does not say `{key}`.")
    if type(value) is not kls:
        raise ModelLoadError(f"{file}: `{key}` must be of type {kls.__name__}, but is {value!r} instead.")
    return value


def has_pooling(head: HeadConfig) -> bool:
    """Whether sentence-transformers has the poolings of ``head``."""
    return all(pooling in POOLINGS.values() for pooling in head.poolings)

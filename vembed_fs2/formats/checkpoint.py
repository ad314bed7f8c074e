"""How checkpoints of a family look in Hugging Face folders."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, cast, final

from fairseq2.models.hg import HuggingFaceConfig, HuggingFaceConverter
from fairseq2.utils.structured import StandardValueConverter, StructureError
from fairseq2.utils.validation import StandardObjectValidator, ValidationError, ValidationResult
from torch import Tensor
from typing_extensions import override

from vembed_fs2.dtypes import dtype_name
from vembed_fs2.embedding.head import HeadConfig, ImageHeadConfig
from vembed_fs2.embedding.learned import LOGIT_BIAS, LOGIT_SCALE, TEACHER_PROJECTION
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json, write_json
from vembed_fs2.formats.extra_fields import add_extra_fields, find_extra_fields
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.formats.key_map import Drop, KeyMap

ConfigT = TypeVar("ConfigT")

CONFIG_FILE: Final = "config.json"

HOW_TO_TRUST: Final = (
    "`trust_remote_code=True` in Python, `--trust-remote-code` of a command, "
    "`model.config_overrides.trust_remote_code=true` for training"
)
"""How a user asks for Python code that comes with a model."""


class NeedsCodeError(ModelLoadError):
    """Raised when a model can be loaded only with Python code that comes with it, which was not allowed."""


def drop_learned(config: object, *, kept: Collection[str] = ()) -> Drop:
    """Return the rule for what objectives learn and a format has no place for.

    :param kept: the names of what it has a place for.
    """
    names = [LOGIT_SCALE, LOGIT_BIAS, TEACHER_PROJECTION, *(p.name for p in getattr(config, "learned", None) or ())]
    return Drop(ours="|".join(name for name in names if name not in kept))


class CheckpointFormat(HuggingFaceConverter):
    """How a family's checkpoints look in Hugging Face transformers, read both ways.

    Subclasses :class:`fairseq2.models.hg.HuggingFaceConverter`, so fairseq2's
    own export works too. Its methods are named ``to_hg_``; ours say ``hf``.
    """

    model_types: Sequence[str] = ()
    """The ``model_type`` values of ``config.json`` that the family reads."""

    sentence_module: str | None = None
    """
    The module of sentence-transformers that holds a whole model in transformers'
    layout, if it has one: it is written if there is no head that says what follows.
    """

    @abstractmethod
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> Any:
        """Convert ``config.json`` to the family's configuration.

        :param head: what follows the backbone, if the folder has it.
        :param keys: the names of the tensors in the checkpoint.
        :raises ModelLoadError: an option is not supported; the message names the field.
        """

    def key_map(self, config: Any) -> KeyMap:
        """Return how the tensors of transformers become the family's. A family says this, or the two below."""
        raise NotImplementedError(f"{type(self).__name__} must define `key_map`.")

    def has_our_names(self, keys: Collection[str], config: Any) -> bool:
        """Whether tensors have the family's names already."""
        return False

    def from_hf_state_dict(self, state_dict: dict[str, object], config: Any) -> dict[str, object]:
        """Convert tensors to the family's names. A state dict that has them already is returned as it is."""
        if self.has_our_names(state_dict, config):
            return state_dict
        return dict(self.key_map(config).read(cast(dict[str, Tensor], state_dict)))

    @final
    def read_tensors(self, tensors: Mapping[str, Tensor], config: Any) -> Iterator[tuple[str, object]]:
        """Convert tensors to the family's names, one at a time.

        :param tensors: by their names; each is loaded when it is asked for.
        """
        if type(self).from_hf_state_dict is not CheckpointFormat.from_hf_state_dict:
            yield from self.from_hf_state_dict(dict(tensors), config).items()
        elif self.has_our_names(tensors, config):
            yield from tensors.items()
        else:
            yield from self.key_map(config).read(tensors)

    @override
    @abstractmethod
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        """Convert the family's configuration to transformers' (the reverse of :meth:`from_hf_config`)."""

    @override
    def to_hg_state_dict(self, state_dict: dict[str, object], config: object) -> dict[str, object]:
        """Convert the family's tensors to transformers' (the reverse of :meth:`from_hf_state_dict`)."""
        return dict(self.key_map(config).write(cast(dict[str, Tensor], state_dict)))

    def from_folder(self, folder: ModelFolder, *, trust_remote_code: bool = False) -> Any:
        """Read the configuration of a folder.

        :param trust_remote_code: whether Python code in the folder may be run, if the family can do that at all.
        """
        return self.from_hf_config(folder.config, head=folder.head(), keys=folder.keys())

    def config_fields(self, config: Any) -> Mapping[str, object]:
        """Return the fields of ``config.json`` that the configuration says, in every spelling.

        All others come back in an exported folder as they were. The value of a
        nested configuration is a mapping of its own fields.
        """
        import transformers

        hf_config = self.to_hg_config(config)
        fields = dict.fromkeys(hf_config.data)
        aliases: Mapping[str, str] = getattr(transformers, hf_config.kls_name).attribute_map

        return fields | dict.fromkeys(alias for alias, name in aliases.items() if name in fields)

    def find_extra_fields(self, hf_config: Mapping[str, Any], config: Any) -> dict[str, object]:
        """Return the fields of ``config.json`` that would be lost in an exported folder."""
        return find_extra_fields(hf_config, self.describe_config(config), self.config_fields(config))

    @final
    def save(self, folder: Path, state_dict: dict[str, object], config: object) -> None:
        """Write a folder: configuration, weights, and what else belongs to it.

        :param state_dict: the tensors by the family's names.
        """
        from huggingface_hub import save_torch_state_dict

        tensors = cast(dict[str, Tensor], self.to_hg_state_dict(state_dict, config))
        folder.mkdir(parents=True, exist_ok=True)
        self.write_config(folder, config)
        _write_dtype(folder / "config.json", tensors.values())
        save_torch_state_dict(tensors, folder)
        self.write_files(folder, config)

    def describe_config(self, config: Any) -> dict[str, Any]:
        """Return the content of ``config.json``: as transformers' class of :meth:`to_hg_config` has it."""
        import transformers

        hf_config = self.to_hg_config(config)
        native = getattr(transformers, hf_config.kls_name)()
        for name, value in hf_config.data.items():
            setattr(native, name, value)

        native.architectures = [hf_config.arch]
        content: dict[str, Any] = json.loads(native.to_json_string())

        return content

    def write_config(self, folder: Path, config: object) -> None:
        """Write ``config.json``, with the fields of the folder that the model came from."""
        content = self.describe_config(config)
        if extra := getattr(config, "extra_fields", {}).get(CONFIG_FILE):
            content = add_extra_fields(content, extra, self.config_fields(replace(cast(Any, config), extra_fields={})))

        # In transformers' order.
        write_json(folder / CONFIG_FILE, json.loads(json.dumps(content, sort_keys=True)))

    def write_files(self, folder: Path, config: object) -> None:
        """Write what else belongs to an exported folder, after configuration and weights. Nothing, by default."""


def _write_dtype(file: Path, tensors: Iterable[Tensor]) -> None:
    """Say in ``config.json`` which type the weights are written in: the one that most of their numbers have."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.is_floating_point():
            counts[dtype_name(tensor.dtype)] += tensor.numel()

    if counts:
        # The name that every version of transformers reads.
        values = {key: value for key, value in read_json(file).items() if key != "dtype"}
        write_json(file, dict(sorted({**values, "torch_dtype": counts.most_common(1)[0][0]}.items())))


@final
class PlainCheckpointFormat(CheckpointFormat, Generic[ConfigT]):
    """The format of a family that transformers does not have.

    ``config.json`` holds the family's own configuration under ``model_config``,
    and tensors keep their names. If the configuration has a field ``head`` of
    type :class:`HeadConfig`, it must call the size of token states
    ``model_dim``; sentence-transformers' modules are then read and written as well.
    """

    def __init__(self, model_type: str, config_kls: type[ConfigT]) -> None:
        """
        :param model_type: the ``model_type`` of ``config.json``: letters, digits and ``_``, of this family only.
        :param config_kls: a dataclass.
        """
        self.model_types = (model_type,)
        self._model_type = model_type
        self._config_kls = config_kls

    @override
    def from_hf_config(
        self, hf_config: Mapping[str, Any], *, head: HeadConfig | None = None, keys: frozenset[str] = frozenset()
    ) -> ConfigT:
        values = hf_config.get("model_config")
        if not isinstance(values, Mapping):
            raise ModelLoadError("config.json: `model_config` must hold the fields of the model's configuration.")
        if wants_code(values):
            raise ModelLoadError("config.json: `model_config` asks for `trust_remote_code`, which a file must not.")

        try:
            config: ConfigT = StandardValueConverter().structure(values, self._config_kls)
        except StructureError as ex:
            raise ModelLoadError(f"config.json: `model_config` is not valid. {_reason_of(ex)}") from None

        if head is not None and _text_head_of(config) is not None:
            setattr(config, "head", head)  # noqa: B010  (mypy does not know the field)
        elif head is not None and head.dense:
            raise ModelLoadError(f"Dense modules after a {self._model_type} model are not supported.")

        if errors := config_errors(config):
            raise ModelLoadError(f"config.json: `model_config` is not valid. {' '.join(errors)}")

        return config

    @override
    def key_map(self, config: object) -> KeyMap:
        return KeyMap(drop_learned(config, kept=(LOGIT_SCALE, LOGIT_BIAS)))

    @override
    def has_our_names(self, keys: Collection[str], config: object) -> bool:
        return True

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        data = self._values_of(config)
        name = declare_hf_config(f"Vembed_{self._model_type}_Config", self._model_type, data)
        return HuggingFaceConfig(data, kls_name=name, arch=self._model_type)

    @override
    def config_fields(self, config: Any) -> Mapping[str, object]:
        return dict.fromkeys(self._values_of(config))

    @override
    def describe_config(self, config: Any) -> dict[str, Any]:
        import transformers

        return {
            "architectures": [self._model_type],
            "model_type": self._model_type,
            "transformers_version": transformers.__version__,
            **self._values_of(config),
        }

    def _values_of(self, config: object) -> dict[str, object]:
        values: Any = StandardValueConverter().unstructure(config)

        # What belongs to a training is of no use after it; extra fields stand beside the configuration.
        kept = {k: v for k, v in values.items() if k not in ("teacher_dim", "learned", "extra_fields")}

        data: dict[str, object] = {"model_config": kept}
        if _text_head_of(config) is not None:
            # sentence-transformers' pooling looks here for the size of its inputs.
            data["hidden_size"] = getattr(config, "model_dim")  # noqa: B009  (mypy does not know the field)

        return data


def declare_hf_config(name: str, model_type: str, fields: Iterable[str], base: type | None = None) -> str:
    """Make a class of ``config.json`` known to fairseq2's own export, which finds it in transformers, by its name.

    What is written by :meth:`CheckpointFormat.save` does not need it.

    :param fields: the names of the fields that ``base`` may not have.
    :param base: a subclass of ``transformers.PretrainedConfig``, or that class itself if ``None``.
    :returns: ``name``.
    """
    import transformers

    base = base or transformers.PretrainedConfig
    known = base()
    missing = {field: None for field in fields if not hasattr(known, field)}
    setattr(transformers, name, type(name, (base,), {"model_type": model_type, **missing}))

    return name


def _reason_of(error: StructureError) -> str:
    """The messages from the outermost field down to its value."""
    reasons = []
    cause: BaseException | None = error
    while isinstance(cause, StructureError):
        # The chain also names each class on the way.
        if not str(cause).startswith("Value cannot be structured to"):
            reasons.append(str(cause))
        cause = cause.__cause__

    return " ".join(reasons)


def config_errors(config: object, path: str = "") -> list[str]:
    """Return all that ``validate`` of a configuration and of the configurations inside it finds wrong.

    :param path: what the configuration is below of, with a dot at its end.
    """
    try:
        StandardObjectValidator().validate(config)
    except ValidationError as ex:
        return _list_errors(ex.result, path)
    return []


def _list_errors(result: ValidationResult, path: str) -> list[str]:
    errors = [f"`{path.rstrip('.')}`: {e}" if path else str(e) for e in result.errors]
    for name, sub_result in result.sub_results.items():
        errors += _list_errors(sub_result, f"{path}{name}.")
    return errors


def head_of(config: object) -> HeadConfig | None:
    """Return the head of a model configuration, of texts, images or both, if it has one."""
    heads = (getattr(config, name, None) for name in ("head", "image_head"))
    return next((head for head in heads if isinstance(head, HeadConfig)), None)


def set_image_head(config: object, head: ImageHeadConfig) -> None:
    """Replace the head of the configuration of a model of images, or of texts and images.

    :raises ModelLoadError: it has none.
    """
    name = "image_head" if hasattr(config, "image_head") else "head"
    current = getattr(config, name, None)
    if isinstance(current, ImageHeadConfig) or (name == "image_head" and head.is_pooler_alone):
        setattr(config, name, head)
    elif hasattr(config, name) and current is None:
        setattr(config, name, HeadConfig(**vars(head)))
    else:
        raise ModelLoadError("The folder names an image pooling, but its model has no options for that.")


def _text_head_of(config: object) -> HeadConfig | None:
    head = head_of(config)
    return None if isinstance(head, ImageHeadConfig) else head


def wants_code(values: object) -> bool:
    """Whether a configuration asks to run Python code that came with a model: that is not for a file to say."""
    if isinstance(values, Mapping):
        inner = (value for key, value in values.items() if key not in ("hf_config", "extra_fields"))
        return values.get("trust_remote_code") is True or any(map(wants_code, inner))
    return isinstance(values, (list, tuple)) and any(map(wants_code, values))

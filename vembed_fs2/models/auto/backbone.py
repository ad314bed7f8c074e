"""Which class of transformers a ``config.json`` means, and what the class reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor
from torch.nn import Module, Parameter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from vembed_fs2.embedding.model import Modality
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.checkpoint import HOW_TO_TRUST, NeedsCodeError
from vembed_fs2.formats.rope import create_config, require_read

_TEXT: Final[frozenset[Modality]] = frozenset({"text"})
_IMAGE: Final[frozenset[Modality]] = frozenset({"image"})

_SOUNDS: Final = frozenset({"input_features", "input_values"})
"""What models of sound call their inputs; some read texts as well (CLAP)."""


COUNT_FROM_PADDING: Final = frozenset(
    {
        "altclip",
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""RoBERTa and what comes of it: models whose positions are counted from the one after the padding's."""

_WITH_SOFT_CAP: Final = ("gemma2", "t5gemma", "vaultgemma")
"""Models whose attention scores have a limit, `attn_logit_softcapping`."""

_PROBE_VALUES: Final = 2**22
"""How many values of a matrix are not zero in a probe: over 1000 rows of a table, which hold the probes' inputs."""


@dataclass(frozen=True)
class Code:
    """Python code beside a model's weights."""

    folder: Path
    """The folder of its files."""

    trusted: bool = False
    """Whether it may be run."""


@dataclass(frozen=True)
class Backbone:
    """A class of transformers, and what it is made of."""

    kls: Any
    """A subclass of ``transformers.PreTrainedModel``."""

    config: Any
    """A ``transformers.PretrainedConfig``."""

    modalities: frozenset[Modality]
    """What it reads; if both, it is a dual encoder with a projection of its own for each."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the class."""

    text_arguments: frozenset[str] = frozenset()
    """The names of what its function for texts takes."""

    image_arguments: frozenset[str] = frozenset()
    """The names of what its function for images takes."""

    @property
    def is_dual(self) -> bool:
        """Whether texts and images each have an encoder of their own."""
        return len(self.modalities) == 2

    @property
    def text_config(self) -> Any:
        """The configuration of what reads texts."""
        return getattr(self.config, "text_config", self.config) if self.is_dual else self.config

    @property
    def vision_config(self) -> Any:
        """The configuration of what reads images."""
        return getattr(self.config, "vision_config", self.config) if self.is_dual else self.config

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only those before it, as in the decoders that write texts."""
        causal, masked = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_MASKED_LM_MAPPING
        kind = type(self.config)
        return causal.get(kind, None) is not None and masked.get(kind, None) is None

    @property
    def max_text_length(self) -> int | None:
        """The longest text in tokens, special tokens included; ``None`` if it is not known, or there is no limit."""
        length = getattr(self.text_config, "max_position_embeddings", None)
        if not isinstance(length, int) or length < 1:
            return None

        offset = (self.text_config.pad_token_id or 0) + 1 if self._counts_from_padding else 0

        return length - offset

    @property
    def vocab_size(self) -> int | None:
        """The number of rows of the token embedding table; ``None`` if it is not known, or there is none."""
        size = getattr(self.text_config, "vocab_size", None) if "text" in self.modalities else None
        return size if isinstance(size, int) and size > 0 else None

    @property
    def _counts_from_padding(self) -> bool:
        if self.kls.__module__.startswith("transformers.models."):
            return self.config.model_type in COUNT_FROM_PADDING

        # Code of a model's own, which is mostly a copy of one of these.
        return hasattr(inspect.getmodule(self.kls), "create_position_ids_from_input_ids")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it was made for; 224 if it takes any."""
        size = getattr(self.vision_config, "image_size", None)
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[0]), int(size[1])
        return (size, size) if isinstance(size, int) else (224, 224)

    @property
    def num_channels(self) -> int:
        channels = getattr(self.vision_config, "num_channels", 3)
        return channels if isinstance(channels, int) else 3

    def create(self) -> Module:
        """Create the model, with random weights as transformers draws them.

        :raises ModelLoadError: its configuration does not fit together.
        """
        try:
            model: Module = self.kls(deepcopy(self.config), **self.options)
        except Exception as ex:  # Each class has checks of its own, or none.
            name = self.kls.__name__
            raise ModelLoadError(f"transformers' {name} cannot be made of this config.json: {ex}") from ex
        return model

    def create_empty(self) -> Module:
        """Create the model without memory for its tensors."""
        return self.create_without_weights()[0]

    def create_without_weights(self) -> tuple[Module, dict[str, Tensor]]:
        """Create the model without memory for its tensors.

        :returns: the model; and the values of the buffers that no checkpoint has, by name.
        """
        model = self._create_without_parameters()
        persistent = model.state_dict().keys()
        constants = {name: buffer for name, buffer in model.named_buffers() if name not in persistent}
        return model.to("meta"), constants

    def create_probe(self) -> Module:
        """Create the model with simple weights, for a look at what it does: on the CPU, in float32.

        All matrices share their memory, of which only the beginning is touched;
        so it takes a few megabytes, whatever the model.
        """
        model = self._create_without_parameters()
        size = max((p.numel() for p in model.parameters()), default=0)
        pool = torch.zeros(size)
        pool[:_PROBE_VALUES].normal_(std=0.02, generator=torch.Generator().manual_seed(0))

        parameters: dict[int, Parameter] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = Parameter(_simple_weight(parameter.shape, name == "bias", pool))
                module._parameters[name] = parameters[id(parameter)]

        return model

    def _create_without_parameters(self) -> Module:
        """Create the model; its buffers have their values, and its parameters no memory."""
        from transformers.integrations.accelerate import init_empty_weights
        from transformers.modeling_utils import no_init_weights

        # As `from_pretrained` does; fairseq2's own modes must not see it.
        with no_init_weights(), init_empty_weights():
            model: Any = self.create()

        # Parameters that modules share were registered once for each.
        model.tie_weights()
        return model  # type: ignore[no-any-return]

    def load(self, state_dict: Mapping[str, object], dtype: Any) -> tuple[Module, dict[str, list[str]]]:
        """Create the model with the tensors of a checkpoint, whatever version or head they come from.

        :returns: the model; and the names of tensors that are missing and that were not expected.
        """
        with _quiet():
            model, info = self.kls.from_pretrained(
                None,
                config=deepcopy(self.config),
                state_dict=dict(state_dict),
                output_loading_info=True,
                dtype=dtype,
                **self.options,
            )

        return model, info


def _simple_weight(shape: torch.Size, is_bias: bool, pool: Tensor) -> Tensor:
    """Make weights of about the size that new models have: norms that scale by 1, no biases, small matrices."""
    if len(shape) < 2:
        return torch.zeros(shape) if is_bias else torch.ones(shape)
    return pool[: shape.numel()].view(shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning of what is checked here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()

    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def find_backbone(hf_config: Mapping[str, Any], *, pooler: bool | None = None, code: Code | None = None) -> Backbone:
    """Find the class that ``config.json`` means.

    :param pooler: whether to have the class's own pooler, if that is a choice; ``None`` leaves it to the class.
    :param code: the code in the model's folder, if there is any.
    :raises ModelLoadError: there is none, its configuration is not valid, or no
        embeddings can be made with it; the message says why.
    """
    if hf_config.get("quantization_config"):
        raise ModelLoadError("config.json: `quantization_config` is set, but quantised models are not supported.")

    config_kls, kls = _find_code(hf_config, code)
    config_kls = config_kls or _config_class(hf_config)
    config, rope = create_config(hf_config, config_kls)
    config.dtype = None  # Weights come in the type that the user asks for.

    kls = kls or _model_class(config)
    require_read(hf_config, rope, config_kls, kls)
    if config.model_type in _WITH_SOFT_CAP and config.attn_logit_softcapping is not None:
        # torch's own attention would leave it out, without a word.
        config._attn_implementation = "eager"

    if getattr(config, "attention_type", None) == "block_sparse":
        raise ModelLoadError(
            "config.json: `attention_type` is 'block_sparse', whose embeddings depend on the other texts of a batch. "
            "Set it to 'original_full'."
        )

    has_choice = pooler is not None and "add_pooling_layer" in _arguments(kls.__init__)
    options = {"add_pooling_layer": pooler} if has_choice else {}

    if hasattr(kls, "get_text_features") and hasattr(kls, "get_image_features"):
        return Backbone(
            kls, config, _TEXT | _IMAGE, {}, _arguments(kls.get_text_features), _arguments(kls.get_image_features)
        )

    arguments, main_input = _arguments(kls.forward), kls.main_input_name

    reads_texts, reads_images = "input_ids" in arguments, "pixel_values" in arguments
    if reads_texts and reads_images:
        raise unfit(kls, "it reads texts and images in one sequence")
    if sounds := sorted(arguments & _SOUNDS):
        raise unfit(kls, f"its inputs are `{sounds[0]}`, which are sound")
    if main_input == "input_ids" and reads_texts:
        return Backbone(kls, config, _TEXT, options, arguments)
    if main_input == "pixel_values" and reads_images:
        return Backbone(kls, config, _IMAGE, options, frozenset(), arguments)

    raise unfit(kls, f"its inputs are `{main_input}`, neither texts nor images")


def _find_code(hf_config: Mapping[str, Any], code: Code | None) -> tuple[Any, Any]:
    """The classes of configuration and model in the model's own code, if it is needed or asked for."""
    auto_map = hf_config.get("auto_map")
    if not isinstance(auto_map, Mapping):
        return None, None

    if not (code is not None and code.trusted):
        if hf_config.get("model_type") in CONFIG_MAPPING_NAMES:
            return None, None  # Like transformers: its own class, if it has one.

        reference = str(auto_map.get("AutoModel") or next(iter(auto_map.values()), ""))
        repository, _, file = reference.rpartition(".")[0].rpartition("--")
        here = file if code is None else code.folder / file
        where = f"{file}.py of {repository}" if repository else f"{here}.py"
        raise NeedsCodeError(
            f"model_type '{hf_config.get('model_type')}' needs the model's own code, {where}. Read it, and if you "
            f"trust it, ask for it: {HOW_TO_TRUST}."
        )

    return _import(auto_map, "AutoConfig", code), _import(auto_map, "AutoModel", code)


def _import(auto_map: Mapping[str, Any], name: str, code: Code) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = auto_map.get(name)
    if not isinstance(reference, str):
        return None

    if "--" not in reference and not code.folder.is_dir():
        # transformers would take it for the name of a repository.
        raise ModelLoadError(f"The model needs the code of {reference}, but {code.folder} does not exist.")

    try:
        return get_class_from_dynamic_module(reference, str(code.folder))
    except Exception as ex:  # Anybody's code.
        raise ModelLoadError(f"The code of {reference} in {code.folder} cannot be imported: {ex}") from ex


def _config_class(hf_config: Mapping[str, Any]) -> Any:
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelLoadError("`hf_config` must be the content of a config.json, with a `model_type`.")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ModelLoadError(f"model_type '{model_type}' is not known to transformers {transformers.__version__}.")
    return transformers.CONFIG_MAPPING[model_type]


def _model_class(config: Any) -> Any:
    kls = transformers.MODEL_MAPPING.get(type(config), None)
    if isinstance(kls, (list, tuple)):
        named = [k for k in kls if k.__name__ in (config.architectures or ())]
        kls = (named or list(kls))[0]

    # transformers has some encoders alone, for example T5's, which Sentence-T5 and GTR use. A folder of such a one says
    # that it is no encoder-decoder, but its base model has both.
    encoder = transformers.MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    has_encoder = encoder is not None and encoder is not kls
    if getattr(config, "is_encoder_decoder", False):
        if not has_encoder:
            raise unfit(kls, "it is an encoder-decoder")
        kls = encoder
    elif has_encoder and kls is not None and "decoder_input_ids" in _arguments(kls.forward):
        kls = encoder

    if kls is None:
        raise ModelLoadError(f"transformers has no base model for model_type '{config.model_type}'.")

    return kls


def _arguments(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def unfit(kls: Any, reason: str) -> ModelLoadError:
    """Return the error of a class that no embeddings can be made with."""
    return ModelLoadError(f"No embeddings can be made with transformers' {getattr(kls, '__name__', kls)}: {reason}.")

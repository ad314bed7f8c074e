"""What a processor needs to know beside its tokenizer's and its image processor's files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json, write_json

_FILE: Final = "vembed_processor.json"


@dataclass(kw_only=True)
class ProcessorSettings:
    """What a tokenizer and an image processor do not say themselves."""

    max_length: int | None = None
    """The longest text in tokens; longer ones are cut."""

    min_pixels: int | None = None
    """Smaller images are enlarged to so many pixels, by models that take images of any size; ``None`` for theirs."""

    max_pixels: int | None = None
    """Larger images are made smaller, to so many pixels; ``None`` for what the model's folder says."""

    prompts: dict[str, str] = field(default_factory=dict)
    """Texts put before an input, by name; ``query`` and ``document`` are used for these roles."""

    default_prompt_name: str | None = None
    """The prompt that is used when none is asked for."""

    instruction_template: str = "{instruction} "
    """How an instruction is put before a text."""

    include_prompt: bool = True
    """If ``False``, the tokens of prompts take no part in mean pooling."""

    do_lower_case: bool = False
    """If ``True``, texts are lowercased before tokenization."""

    text_cleaning: str = ""
    """How texts are cleaned before tokenization, as open_clip does it; not at all if empty."""

    open_clip_bpe: bool = False
    """If ``True``, CLIP's tokenizer does what open_clip's own does, on cleaned texts."""

    strip_sep_token: bool = False
    """If ``True``, separator tokens become tokens of index 0, as in CLIPA."""


def save_settings(settings: ProcessorSettings, folder: Path) -> None:
    """Write settings to a file of ``folder``."""
    write_json(folder / _FILE, asdict(settings))


def read_settings(folder: Path) -> ProcessorSettings | None:
    """Read the settings that :func:`save_settings` wrote; ``None`` if there are none.

    :raises ModelLoadError: a key is unknown, or a value is of a wrong type.
    """
    file = folder / _FILE
    if not file.is_file():
        return None

    values = read_json(file)
    known = {f.name for f in fields(ProcessorSettings)}
    if unknown := sorted(set(values) - known):
        raise ModelLoadError(f"{file} has unknown keys: {', '.join(unknown)}.")

    return _check_types(ProcessorSettings(**values), file)


def _check_types(settings: ProcessorSettings, file: Path) -> ProcessorSettings:
    default = ProcessorSettings()
    for f in fields(settings):
        value, example = getattr(settings, f.name), getattr(default, f.name)
        kinds: tuple[type, ...] = (type(example),)
        if example is None:
            kinds = (str if f.name == "default_prompt_name" else int, type(None))
        if type(value) not in kinds:
            raise ModelLoadError(f"{file}: `{f.name}` must not be {value!r}.")

    if not all(isinstance(p, str) for p in settings.prompts.values()):
        raise ModelLoadError(f"{file}: `prompts` must hold texts by name.")

    return settings

"""Tokenizers as version 5 of transformers writes them.

Its classes are not those of version 4, even if they have the same names; what a
tokenizer does stands in ``tokenizer.json`` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json

_BACKEND: Final = "backend"
"""The field that only version 5 writes."""

_LISTED: Final = "extra_special_tokens"
"""Tokens without a role: a list in version 5. In version 4, the field holds tokens of other roles, by name."""


def is_of_version_5(folder: Path) -> bool:
    """Whether version 5 wrote the tokenizer of a folder, or its class is one that version 4 does not have."""
    file = folder / "tokenizer_config.json"
    if not file.is_file() or not folder.joinpath("tokenizer.json").is_file():
        return False

    config = read_json(file)
    name = config.get("tokenizer_class")
    if _BACKEND in config or isinstance(config.get(_LISTED), list):
        return True
    if not isinstance(name, str) or "auto_map" in config:
        return False
    return all(tokenizer_class_from_name(n) is None for n in (name, f"{name}Fast"))


def load_of_version_5(folder: Path) -> PreTrainedTokenizerFast:
    """Load what ``tokenizer.json`` says, with the special tokens and the limits of ``tokenizer_config.json``."""
    config = read_json(folder / "tokenizer_config.json")
    extra = config.get(_LISTED) or []
    named = config.get("model_specific_special_tokens") or (extra if isinstance(extra, dict) else {})

    options: dict[str, Any] = {_LISTED: named}
    if isinstance(extra, list) and extra:
        options["additional_special_tokens"] = [_content(token) for token in extra]

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # The class is another one, as it says; but not the tokenizer.
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, **options
        )
    finally:
        transformers.logging.set_verbosity(verbosity)

    for name in (_BACKEND, "is_local", "model_specific_special_tokens"):
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def _content(token: object) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ModelLoadError(f"tokenizer_config.json: `{_LISTED}` must be a list of tokens, but has {token!r}.")
    return content

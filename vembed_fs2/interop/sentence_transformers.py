"""The folder layout of sentence-transformers, read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vembed_fs2.models.embedding import HeadConfig, Similarity


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
    """The longest text in tokens, where the folder says it."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    """Prompt texts by name."""

    default_prompt_name: str | None = None
    """The prompt that is used when none is asked for."""

    do_lower_case: bool = False
    """If ``True``, texts are lowercased before tokenization."""

    similarity: Similarity = "cosine"
    """How embeddings are compared."""


def read_modules(root: Path) -> SentenceModules:
    """Read a sentence-transformers folder.

    :raises ModelLoadError: a file is missing or broken, or a module is not supported.
    """
    raise NotImplementedError

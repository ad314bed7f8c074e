"""Texts to token ids, with the model's own tokenizer.

Shapes: T texts, L tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, final

import numpy as np
import torch
from tokenizers import Tokenizer, normalizers
from torch import Tensor
from transformers import AutoTokenizer

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.open_clip import find_tokenizer_name
from vembed_fs2.processing.open_clip import OpenClipTexts, load_built_in_tokenizer
from vembed_fs2.processing.siglip_tokenizer import is_siglip_tokenizer, load_siglip_tokenizer
from vembed_fs2.processing.version_5 import is_of_version_5, load_of_version_5
from vembed_fs2.processing.vocabulary import fit_vocabulary

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)

# Tokenizers without a limit say 1e30.
_NO_LIMIT: Final = 10**9

_MAX_PREFIXES: Final = 1024
"""The prefixes whose lengths are remembered."""


class TokenizedTexts(NamedTuple):
    """Token ids and masks as :class:`~vembed_fs2.embedding.model.EncoderBatch` holds them, on the CPU."""

    input_ids: Tensor
    """Padded on the right. *Shape:* ``[T, L]``, int64."""

    attention_mask: Tensor | None
    """``None`` if the model attends to padding. *Shape:* ``[T, L]``, bool."""

    token_type_ids: Tensor | None
    """``None`` if the model has no segments. *Shape:* ``[T, L]``, int64."""

    pooling_mask: Tensor | None
    """Without the tokens of prefixes, if these are masked. *Shape:* ``[T, L]``, bool."""


@final
class TextProcessor:
    """Tokenizes texts in batches. Threads may share one."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        model_max_length: int | None = None,
        vocab_size: int | None = None,
        do_lower_case: bool = False,
        padding: Literal["longest", "max_length"] = "longest",
        open_clip: OpenClipTexts | None = None,
    ) -> None:
        """
        :param tokenizer: a fast tokenizer of transformers.
        :param max_length: the longest text in tokens, special tokens included;
            if ``None``, the tokenizer's own limit. The rest is cut off.
        :param model_max_length: the longest text that the model can take at all.
        :param vocab_size: the number of tokens that the model has embeddings of.
        :param do_lower_case: if ``True``, the tokenizer lowercases texts.
        :param padding: whether to pad to the longest text or to ``max_length``.
        :param open_clip: what open_clip does besides.
        :raises ModelLoadError: an option does not fit the tokenizer.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelLoadError(f"{type(tokenizer).__name__} has no fast version: add a tokenizer.json.")
        if do_lower_case:
            _add_lowercase(tokenizer.backend_tokenizer)

        self._tokenizer = tokenizer
        self._max_length = _find_max_length(tokenizer, max_length, model_max_length, padding)
        self._names = frozenset(tokenizer.model_input_names)

        # transformers' own call sets truncation and padding each time, which other threads see. So this is a copy
        # whose settings never change.
        self._backend = _copy_backend(tokenizer.backend_tokenizer, tokenizer.split_special_tokens)
        self._open_clip = open_clip or OpenClipTexts()
        self._open_clip.change_backend(self._backend)
        if vocab_size is not None:
            self._backend = fit_vocabulary(self._backend, tokenizer, vocab_size)

        if self._max_length is not None:
            self._backend.enable_truncation(self._max_length, direction=tokenizer.truncation_side)

        self._width = self._max_length if padding == "max_length" else None

        # Models of open_clip see all padding; if texts have their full width already, they need no mask.
        is_unmasked = self._width is not None and bool(self._open_clip.text_cleaning)
        self._is_masked = "attention_mask" in self._names and not is_unmasked
        # open_clip pads with the first token, whatever it is.
        has_padding = tokenizer.pad_token_id is not None and not self._open_clip.open_clip_bpe
        self._pad_id: int = tokenizer.pad_token_id if has_padding else 0
        self._pad_type_id: int = tokenizer.pad_token_type_id

        # A model that does not mask padding may read it, so its side counts.
        self._pads_left = tokenizer.padding_side == "left" and "attention_mask" not in self._names
        self._prefix_lengths: dict[str, int] = {"": 0}

    @staticmethod
    def load(
        folder: Path,
        *,
        max_length: int | None = None,
        model_max_length: int | None = None,
        vocab_size: int | None = None,
        do_lower_case: bool = False,
        padding: Literal["longest", "max_length"] = "longest",
        open_clip: OpenClipTexts | None = None,
    ) -> TextProcessor:
        """Load the tokenizer of a model folder. For the options see the constructor.

        :raises ModelLoadError: ``folder`` has no tokenizer, or one that cannot be loaded.
        """
        has_files = any(folder.joinpath(name).is_file() for name in _TOKENIZER_FILES)
        if not has_files and not (open_clip is not None and open_clip.open_clip_bpe):
            name = find_tokenizer_name(folder)
            hint = "" if name is None else f" open_clip takes the tokenizer of {name}: put its files there."
            raise ModelLoadError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there.{hint}")

        try:
            tokenizer = _load_tokenizer(folder) if has_files else load_built_in_tokenizer(folder)
        except ModelLoadError:
            raise
        except Exception as ex:  # The Rust library raises bare exceptions.
            raise ModelLoadError(f"The tokenizer in {folder} cannot be loaded: {ex}") from None

        try:
            return TextProcessor(
                tokenizer,
                max_length=max_length,
                model_max_length=model_max_length,
                vocab_size=vocab_size,
                do_lower_case=do_lower_case,
                padding=padding,
                open_clip=open_clip,
            )
        except ModelLoadError as ex:
            raise ModelLoadError(f"{folder}: {ex}") from None

    @property
    def max_length(self) -> int | None:
        """The longest text in tokens, special tokens included; ``None`` if there is no limit."""
        return self._max_length

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        return self._tokenizer

    @property
    def appends_token(self) -> bool:
        """Whether a special token follows each text: the end token, for example."""
        ids = self._backend.encode("a").ids
        return bool(ids) and ids[-1] in self._tokenizer.all_special_ids

    @cached_property
    def _uncut(self) -> Tokenizer:
        """The tokenizer, without a limit. Few models need it, and a large vocabulary takes its time."""
        return _copy_backend(self._backend, self._backend.encode_special_tokens)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text that is not cut, special tokens included."""
        ids: list[int] = self._uncut.encode(text).ids
        return ids

    def cut(self, text: str, count: int) -> str:
        """Return a text without its last ``count`` tokens; empty if it has no more."""
        encoding = self._uncut.encode(text, add_special_tokens=False)
        kept = len(encoding) - count
        return text[: encoding.offsets[kept - 1][1]] if kept > 0 else ""

    def __call__(
        self, texts: Sequence[str], *, prefixes: Sequence[str] | None = None, mask_prefixes: bool = False
    ) -> TokenizedTexts:
        """Tokenize texts.

        :param prefixes: what to put before each text, one for each; "" for nothing.
        :param mask_prefixes: if ``True``, ``pooling_mask`` leaves the prefixes
            out, and the special token before them, as sentence-transformers does.
        """
        if prefixes is not None:
            if len(prefixes) != len(texts):
                raise ValueError(f"`prefixes` must be as many as `texts` ({len(texts)}), but are {len(prefixes)}.")
            texts = [prefix + text for prefix, text in zip(prefixes, texts)]

        encodings = self._backend.encode_batch(self._open_clip.clean(texts))
        lengths = torch.tensor([len(e) for e in encodings], dtype=torch.int64)

        # The model sees one padding token of a text without tokens, and poolings see none.
        width = self._width or max(map(len, encodings), default=0) or min(len(encodings), 1)
        attention_mask = mask_tokens(lengths.clamp(min=1), width) if self._is_masked else None
        pooling_mask = mask_tokens(lengths, width) if self._is_masked and bool((lengths == 0).any()) else None
        if prefixes is not None and mask_prefixes:
            pooling_mask = mask_tokens(lengths, width)
            for row, prefix in enumerate(prefixes):
                pooling_mask[row, : self._prefix_length(prefix)] = False

        input_ids = pad_ids([e.ids for e in encodings], width, self._pad_id, left=self._pads_left)
        if self._open_clip.strip_sep_token:
            input_ids[input_ids == self._tokenizer.sep_token_id] = 0

        return TokenizedTexts(
            input_ids,
            attention_mask,
            pad_ids([e.type_ids for e in encodings], width, self._pad_type_id, left=self._pads_left)
            if "token_type_ids" in self._names
            else None,
            pooling_mask,
        )

    def _prefix_length(self, prefix: str) -> int:
        """The tokens of ``prefix``, with the special tokens before it but not those after it."""
        length = self._prefix_lengths.get(prefix)
        if length is None:
            ids = self._backend.encode(self._open_clip.clean([prefix])[0]).ids
            length = len(ids) - 1 if ids and ids[-1] in self._tokenizer.all_special_ids else len(ids)
            if len(self._prefix_lengths) >= _MAX_PREFIXES:  # Every row may have an instruction of its own.
                self._prefix_lengths = {"": 0}
            self._prefix_lengths[prefix] = length
        return length

    def save(self, folder: Path) -> None:
        """Write all files of the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save_pretrained(folder)


def _load_tokenizer(folder: Path) -> Any:
    if is_siglip_tokenizer(folder):
        return load_siglip_tokenizer(folder)
    if is_of_version_5(folder):
        return load_of_version_5(folder)
    return AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True, trust_remote_code=False)


def _find_max_length(tokenizer: Any, max_length: int | None, model_max_length: int | None, padding: str) -> int | None:
    """The length that is asked for, else the tokenizer's own limit; never more than the model takes."""
    if max_length is None and tokenizer.model_max_length < _NO_LIMIT:
        max_length = int(tokenizer.model_max_length)
    if model_max_length is not None:
        max_length = min(max_length or model_max_length, model_max_length)

    if max_length is None:
        if padding == "max_length":
            raise ModelLoadError("Padding to `max_length` needs `max_length`: the tokenizer has no limit of its own.")
    elif max_length <= (special := tokenizer.num_special_tokens_to_add()):
        raise ModelLoadError(f"`max_length` must be more than the {special} special tokens, but is {max_length}.")

    return max_length


def _add_lowercase(backend: Tokenizer) -> None:
    """Put a lowercasing normaliser first, unless there is one, as sentence-transformers does."""
    normalizer = backend.normalizer

    steps = list(normalizer) if isinstance(normalizer, normalizers.Sequence) else [normalizer]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        steps = [normalizers.Lowercase(), *(step for step in steps if step is not None)]
        backend.normalizer = normalizers.Sequence(steps)


def _copy_backend(backend: Tokenizer, encode_special_tokens: bool) -> Tokenizer:
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = encode_special_tokens
    copy.no_truncation()
    copy.no_padding()
    return copy


def mask_tokens(lengths: Tensor, width: int) -> Tensor:
    """True for the first tokens of each text. *Returns:* ``[T, L]``."""
    return torch.arange(width) < lengths.unsqueeze(1)


def pad_ids(rows: Sequence[Sequence[int]], width: int, value: int, *, left: bool = False) -> Tensor:
    """Put rows of ids into one tensor. *Returns:* ``[T, L]``, int64."""
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for row, ids in enumerate(rows):
        start = width - len(ids) if left else 0
        padded[row, start : start + len(ids)] = ids
    return torch.from_numpy(padded)


class _ForkGuard:
    """Keeps the tokenizers library from a deadlock in forked processes.

    Its threads do not survive a fork, for example by a data loader. If the
    environment asks for them, a child waits for them forever; if it does not, some
    versions print a warning in each child. So children do without; the parent
    keeps its setting.
    """

    _NAME: Final = "TOKENIZERS_PARALLELISM"

    def __init__(self) -> None:
        self._setting: str | None = None

    def before_fork(self) -> None:
        self._setting = os.environ.get(self._NAME)
        os.environ[self._NAME] = "false"

    def after_fork(self) -> None:
        if self._setting is None:
            os.environ.pop(self._NAME, None)
        else:
            os.environ[self._NAME] = self._setting


if hasattr(os, "register_at_fork"):
    _guard: Final = _ForkGuard()
    os.register_at_fork(before=_guard.before_fork, after_in_parent=_guard.after_fork)

"""Which tokens a tokenizer can produce, and whether a model has embeddings of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from tokenizers import Tokenizer

from vembed_fs2.errors import ModelLoadError

_TEXT_ROLES: Final = frozenset(f"{name}_token" for name in ("bos", "cls", "eos", "mask", "pad", "sep", "unk"))
"""The roles of special tokens in texts. Any other is for another kind of input: ``image_token``."""


def fit_vocabulary(backend: Tokenizer, tokenizer: Any, vocab_size: int) -> Tokenizer:
    """Return ``backend``, unless it can produce tokens that the model has no embeddings of.

    Placeholders of other inputs than texts (``image_token``) may be such tokens,
    as in text models that come from a multimodal one. What is returned then reads
    their names as plain text.

    :param tokenizer: the tokenizer of transformers that ``backend`` belongs to.
    :param vocab_size: the number of tokens that the model has embeddings of.
    :raises ModelLoadError: there are other such tokens.
    """
    beyond = {idx: token for idx, token in _list_tokens(backend, tokenizer) if idx >= vocab_size}
    if not beyond:
        return backend

    placeholders = _list_placeholders(tokenizer)
    if set(beyond.values()) <= placeholders:
        values = json.loads(backend.to_str())
        values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] not in beyond]
        fitting = Tokenizer.from_str(json.dumps(values))
        fitting.encode_special_tokens = backend.encode_special_tokens
        return fitting

    largest = max(beyond)
    raise ModelLoadError(
        f"the tokenizer needs an embedding table of {largest + 1} rows (for {beyond[largest]!r}), but the model's has "
        f"{vocab_size}. Take the tokenizer that the model was trained with, or add rows to the model (transformers: "
        "`model.resize_token_embeddings(len(tokenizer))`) and save both."
    )


def _list_tokens(backend: Tokenizer, tokenizer: Any) -> Iterator[tuple[int, str]]:
    """The tokens that can come out: of texts, put around them, and as padding."""
    for token, idx in backend.get_vocab(with_added_tokens=False).items():
        yield idx, token

    for idx, added in backend.get_added_tokens_decoder().items():
        # Texts that spell a special token may be taken at their word.
        if not (added.special and backend.encode_special_tokens):
            yield idx, added.content

    around = backend.encode("")
    yield from zip(around.ids, around.tokens)

    if tokenizer.pad_token_id is not None:
        yield tokenizer.pad_token_id, tokenizer.pad_token


def _list_placeholders(tokenizer: Any) -> set[str]:
    """The special tokens that stand for images, sound or the like."""
    roles = dict(tokenizer.init_kwargs)
    if isinstance(extra := roles.get("extra_special_tokens"), dict):
        roles |= extra
    return {str(token) for role, token in roles.items() if role.endswith("_token") and role not in _TEXT_ROLES}

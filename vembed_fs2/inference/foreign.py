"""Arguments of sentence-transformers' ``encode`` that have no place, or another name, in ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from vembed_fs2.errors import VembedError, did_you_mean

_REASONS: Final[Mapping[str, tuple[tuple[object, ...], str]]] = {
    "output_value": (
        ("sentence_embedding",),
        "an input has one embedding; `embedder.model.encode_text_states(batch)` gives the states of tokens.",
    ),
    "pool": ((None,), "run a process with an `Embedder` for each device, or `fairseq2 vembed` on several."),
    "chunk_size": ((None,), "inputs are cut into windows of their own; `batch_size` bounds a forward pass."),
    "processing_kwargs": ((None,), "`max_length` of `Embedder.load` says how long texts may be."),
    "task": ((None,), "the side that inputs stand on is called `role` here: 'query' or 'document'."),
}
"""The values that change nothing, and what to do instead of others."""


def refuse_foreign(function: Callable[..., Any], options: Mapping[str, object]) -> None:
    """Refuse arguments that ``function`` does not have, unless they would change nothing.

    :raises VembedError: it is an argument of sentence-transformers.
    :raises TypeError: there is no such argument anywhere.
    """
    for name, value in options.items():
        if name not in _REASONS:
            hint = did_you_mean(name, inspect.signature(function).parameters)
            raise TypeError(f"`{function.__name__}` has no argument `{name}`.{hint}")

        harmless, reason = _REASONS[name]
        if value not in harmless:
            raise VembedError(f"`{name}` of sentence-transformers is not there: {reason}")

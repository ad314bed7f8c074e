"""Compares embeddings in the form in which they leave an :class:`~vembed_fs2.inference.embedder.Embedder`.

Shapes: N and M inputs, D embedding size, L_i vectors of an input of multi-vector models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.embedding.head import Similarity, is_late_interaction
from vembed_fs2.errors import VembedError
from vembed_fs2.evaluation.search import maxsim_scores, pad_vectors
from vembed_fs2.inference.vectors import Array

Embedded: TypeAlias = Array | Tensor | Sequence[Array] | Sequence[Tensor]
"""``[N, D]``, or ``[D]`` for one input; of multi-vector models a list of ``[L_i, D]``, or ``[L, D]`` for one input."""


def compare_all(a: Embedded, b: Embedded, similarity: Similarity) -> Any:
    """Compare all of ``a`` with all of ``b``; of multi-vector models, ``a`` are the queries.

    :returns: ``[N, M]``, a tensor if ``a`` holds tensors, else an array; one input takes no dimension.
    """
    if is_late_interaction(similarity):
        x, y = _list(a), _list(b)
        scores = _maxsim(x, y) if x and y else torch.zeros(len(x), len(y))
        scores = scores[:, 0] if _is_one(b) else scores
        return _like(scores[0] if _is_one(a) else scores, a)

    x_ND, y_MD = _matrix(a, similarity), _matrix(b, similarity)
    return _like(x_ND @ (y_MD.T if y_MD.ndim > 1 else y_MD).to(x_ND.device), a)


def compare_pairs(a: Embedded, b: Embedded, similarity: Similarity) -> Any:
    """Compare row by row. *Returns:* ``[N]``, as in :func:`compare_all`.

    :raises VembedError: ``a`` and ``b`` are lists of different lengths.
    """
    if is_late_interaction(similarity):
        x, y = _list(a), _list(b)
        if len(x) != len(y):
            raise VembedError(f"To be compared row by row, embeddings must be as many, but are {len(x)} and {len(y)}.")

        scores = torch.cat([_maxsim([q], [d])[0] for q, d in zip(x, y)]) if x else torch.zeros(0)
        return _like(scores[0] if _is_one(a) and _is_one(b) else scores, a)

    x_ND, y_ND = _matrix(a, similarity), _matrix(b, similarity)
    return _like((x_ND * y_ND.to(x_ND.device)).sum(-1), a)


def _matrix(x: Embedded, similarity: Similarity) -> Tensor:
    x_ND = _as_tensor(x)
    return normalize(x_ND, dim=-1) if similarity == "cosine" else x_ND


def _maxsim(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    (queries, query_mask), (documents, document_mask) = pad_vectors(x), pad_vectors(y)
    return maxsim_scores(queries, documents, query_mask, document_mask)


def _list(x: Embedded) -> list[Tensor]:
    """The vectors of each input."""
    return [_as_tensor(vectors) for vectors in ([x] if _is_one(x) else x)]


def _as_tensor(x: object) -> Tensor:
    """:raises VembedError: ``x`` does not hold numbers, or rows of different lengths."""
    try:
        if isinstance(x, Sequence) and x and all(isinstance(row, Tensor) for row in x):
            x = torch.stack(list(x))
        return torch.as_tensor(x).float()
    except (TypeError, ValueError, RuntimeError) as ex:
        kind = type(x).__name__
        raise VembedError(f"Embeddings must be arrays or tensors of numbers, but are of type `{kind}`: {ex}.") from None


def _is_one(x: Embedded) -> bool:
    """Whether it is what a multi-vector model makes of one input."""
    return not isinstance(x, Sequence) and x.ndim == 2


def _like(result: Tensor, example: Embedded) -> Any:
    first = example[0] if isinstance(example, Sequence) and example else example
    return result if isinstance(first, Tensor) else result.cpu().numpy()

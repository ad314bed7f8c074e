"""A retrieval task: queries, documents, and which of them belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from vembed_fs2.data.example import Item


@dataclass(frozen=True)
class RetrievalTask:
    """Queries, the documents to find them in, and which documents answer which query."""

    queries: Sequence[Item]
    """The inputs that ask."""

    corpus: Sequence[Item]
    """The inputs that are searched."""

    relevant: Sequence[Mapping[int, float]]
    """For each query the indices of its relevant documents, with their grades."""

    exclude_self: bool = False
    """If ``True``, query i is document i and must find another one."""

    exclude: Sequence[int] = ()
    """For each query a document that it must not find, or -1; empty if there are none."""

    missing: Sequence[Sequence[float]] = ()
    """For each query the grades of its relevant documents that the corpus lacks; empty if there are none."""

    def excluded(self) -> Sequence[int] | None:
        """Return for each query the document that it must not find, or -1; ``None`` if there are none."""
        if self.exclude_self:
            return range(len(self.queries))
        return self.exclude or None


Relevant: TypeAlias = Mapping[int, float] | Collection[int]
"""The indices of the documents that answer a query, with or without grades."""


NOTHING_RELEVANT: Final = "No query has a relevant document in the corpus, so there is nothing to measure."

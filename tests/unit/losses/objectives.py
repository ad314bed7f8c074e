"""What the tests of objectives share: rows of which some are the same, and comparisons with a formula."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.losses import RowInfo


def embeddings(rows: int, seed: int, dim: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


@dataclass
class Case:
    rows: RowInfo
    seed: int
    rows_per_tile: int

    @property
    def num_queries(self) -> int:
        return self.rows.query_ids.size(0)

    @property
    def num_documents(self) -> int:
        return self.rows.document_ids.size(0)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        return embeddings(self.num_queries, self.seed), embeddings(self.num_documents, self.seed + 100)

    def tiles(self) -> AbstractContextManager[Any]:
        """Lets objectives compute a few rows at a time."""
        return patch("vembed_fs2.losses.tiles.choose_rows_per_tile", lambda blocks: self.rows_per_tile)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows with explicit negatives, of which some have the same label, query or document."""
    num = draw(st.integers(1, 6))
    total = num + draw(st.integers(0, 5))
    small = st.integers(1, 12)  # Small, so that some are the same.
    ids = draw(st.lists(small, min_size=num, max_size=num))
    docs = draw(st.lists(small, min_size=total, max_size=total))
    labels = draw(st.lists(st.integers(-3, 2), min_size=num, max_size=num))
    rows = RowInfo(*(torch.tensor(x) for x in (ids, docs, labels)))
    return Case(rows, draw(st.integers(0, 99)), draw(st.integers(1, 3)))


def same_label(rows: RowInfo, i: int, j: int) -> bool:
    labels = rows.labels.tolist()
    return labels[i] != 0 and labels[i] == labels[j]


def same_pairs(rows: RowInfo) -> Tensor:
    """Documents that are known to be no negatives of a query, without its positive. *Returns:* ``[b, m]``, bool."""
    ids, docs = rows.query_ids.tolist(), rows.document_ids.tolist()
    num, total = len(ids), len(docs)
    same = torch.zeros(num, total, dtype=torch.bool)
    for i in range(num):
        for j in range(total):
            related = j < num and (ids[i] == ids[j] or same_label(rows, i, j))
            same[i, j] = j != i and (related or docs[j] in (docs[i], ids[i]))
    return same


def similarities(query: Tensor, document: Tensor, *, cosine: bool = True) -> Tensor:
    """In float64. *Returns:* ``[b, m]``."""
    q, d = query.double(), document.double()
    return normalize(q, dim=-1) @ normalize(d, dim=-1).T if cosine else q @ d.T


def assert_equal(loss: Tensor, expected: Tensor, leaves: Sequence[Tensor], *, factor: float = 1.0) -> None:
    """Check that ``factor`` times the loss has the expected value and gradients.

    Gradients of one tensor are compared to its largest: what they are sums of may cancel.
    """
    loss = loss * factor
    torch.testing.assert_close(loss.detach().double(), expected.detach().double(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, leaves)
    references = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    for leaf, got, reference in zip(leaves, grads, references):
        assert got.dtype == leaf.dtype
        largest = float(reference.detach().abs().max()) if reference.numel() else 0.0
        torch.testing.assert_close(got.double(), reference.double(), rtol=1e-5, atol=1e-5 * max(largest, 1.0))

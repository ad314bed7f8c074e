"""Gradients of embedding tables, added to the gradients of earlier chunks row by row.

A lookup of a few thousand tokens has a gradient as large as the whole table,
nearly all of it zeros. A step without chunks makes it once; a step of many
chunks would fill, add and drop it for each.

Legend: V rows of a table, D embedding size, M tokens of a chunk, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

_LOOKUP: Final = "EmbeddingBackward0"

_TYPES: Final = (torch.float32, torch.float64)
"""In half precision a running sum of tokens would be less exact than one of chunks."""


def add_lookups_in_place(output: Tensor) -> int:
    """Let the next backward pass of a chunk add the gradients of its lookups to the tables' gradients in place.

    Only lookups for which that is the same are changed: on the CPU, in tables of
    parameters that have a dense gradient already and no hooks. Others, those
    within compiled or checkpointed modules among them, keep their own way. The
    parameter must need no gradient but ``grad``, as in ``backward()`` without ``inputs``.

    :param output: what the encoder made of the chunk, with its graph.
    :returns: the number of lookups that are changed.
    """
    count = 0
    for node in _lookups(output.grad_fn):
        table = getattr(node.next_functions[0][0], "variable", None)
        if table is None or not _can_add(table) or node._saved_sparse or node._saved_scale_grad_by_freq:
            continue

        ids = _saved_ids(node)

        # If the table is no larger than the chunk, a whole gradient costs no more.
        if ids is not None and ids.numel() < table.size(0):
            node.register_prehook(partial(_add, table, ids, node._saved_padding_idx))
            count += 1

    return count


def _lookups(root: Any) -> Iterator[Any]:
    """The nodes of a graph that look rows up in a table."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if node is None:
            continue

        if node.name() == _LOOKUP:
            yield node
            continue

        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                stack.append(child)


def _can_add(table: Tensor) -> bool:
    grad = table.grad

    return (
        type(grad) is Tensor
        and grad.layout == torch.strided
        and grad.device.type == "cpu"
        and grad.dtype in _TYPES
        and grad.dtype == table.dtype
        and grad.shape == table.shape
        and not table._backward_hooks
        and not table._post_accumulate_grad_hooks
    )


def _saved_ids(node: Any) -> Tensor | None:
    """The ids of a lookup; ``None`` if something else keeps them, such as checkpointing, which gives them once."""
    saved: list[Tensor] = []

    def pack(ids: Tensor) -> Tensor:
        saved.append(ids)
        return ids

    try:
        node._raw_saved_indices.register_hooks(pack, lambda ids: ids)
    except RuntimeError:  # It has hooks.
        return None

    return saved[0]


@torch.no_grad()
def _add(table: Tensor, ids: Tensor, padding_idx: int, grads: tuple[Tensor | None]) -> tuple[Tensor | None]:
    """Add the gradient of a lookup to the table's; leave none for the node itself.

    :param grads: the gradient of what was looked up. *Shape:* ``[*ids.shape, D]``.
    """
    (grad,) = grads
    total = table.grad
    if grad is None or total is None or not _can_add(table):
        return grads

    has_padding = padding_idx < table.size(0)  # Else it is -1, without its sign.

    before = total[padding_idx].clone() if has_padding else None

    # Faster by far than `index_add_`, and does the same.
    total += torch.sparse_coo_tensor(
        ids.reshape(1, -1), grad.reshape(-1, grad.size(-1)), table.shape, check_invariants=False
    )
    if before is not None:
        total[padding_idx] = before

    return (None,)

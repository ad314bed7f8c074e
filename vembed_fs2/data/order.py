"""The order of an epoch in which rows of one label stand together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

_LOOK_AHEAD: Final = 64
"""The groups among which one is sought that fits into what is left of a batch."""


def order_by_label(
    labels: NDArray[np.int64], rows_per_label: int, batch_size: int, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Return an order in which each batch holds groups of about ``rows_per_label`` rows of one label.

    Each row stands in it once, so rare and frequent labels are used as often as they
    are. A label's rows are cut at random into groups of equal size (give or take one
    row), as near to ``rows_per_label`` as their number allows, and of two rows at
    least: a label with fewer rows is one group, and only a label with one row stands alone.
    The groups of a label are spread evenly over the epoch. A row without a label is a group of its own.

    :param labels: the label of each row; 0 for none. *Shape:* ``[N]``.
    :param batch_size: the number of rows of a global batch.
    """
    num_rows = len(labels)

    # NumPy promises the raw numbers of Philox for all versions, but not `Generator.permutation`.
    numbers = np.random.Philox(key=[seed, epoch]).random_raw(2 * num_rows)
    by_label = np.lexsort((numbers[:num_rows], labels))
    class_starts, class_sizes = _classes(labels[by_label])

    wanted = (2 * class_sizes + rows_per_label) // (2 * rows_per_label)  # Rounded.
    num_groups = np.maximum(np.minimum(wanted, class_sizes // 2), 1)
    base, more = class_sizes // num_groups, class_sizes % num_groups

    # Which class each group belongs to, and its number in it.
    owner = np.repeat(np.arange(len(num_groups)), num_groups)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(num_groups) - num_groups, num_groups)
    sizes = base[owner] + (number < more[owner])
    starts = class_starts[owner] + number * base[owner] + np.minimum(number, more[owner])

    place = (number + numbers[num_rows : num_rows + len(owner)] / 2.0**64) / num_groups[owner]
    groups = np.argsort(place, kind="stable")

    pieces = np.array(list(_fill_batches(starts[groups].tolist(), sizes[groups].tolist(), batch_size)), dtype=np.int64)
    first, size = pieces.reshape(-1, 2).T
    return by_label[np.repeat(first - (np.cumsum(size) - size), size) + np.arange(num_rows)]


def _classes(ordered: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each class begins among ordered labels, and how many rows it has; each row without a label is one."""
    is_first = np.ones(len(ordered), dtype=bool)
    is_first[1:] = (ordered[1:] != ordered[:-1]) | (ordered[1:] == 0)
    starts = np.flatnonzero(is_first)
    return starts, np.diff(starts, append=len(ordered))


def _fill_batches(starts: list[int], sizes: list[int], batch_size: int) -> Iterator[tuple[int, int]]:
    """Put groups into batches: a group that does not fit into what is left of one waits for the next, if others fit.

    :returns: the start and the size of each group in turn; some are cut in two at the end of a batch.
    """
    waiting: deque[tuple[int, int]] = deque(zip(starts, sizes))
    space = batch_size
    while waiting:
        start, size = waiting[0]
        if size <= space and space - size != 1:
            waiting.popleft()
        else:
            index = _choose([size for _, size in islice(waiting, _LOOK_AHEAD)], space)
            start, size = waiting[index]
            del waiting[index]

        if size > space:
            waiting.appendleft((start + space, size - space))
            size = space

        yield start, size
        space = space - size or batch_size


def _choose(sizes: list[int], space: int) -> int:
    """The first group that fits, and does not leave room for a single row, which would have no partner; else the first
    that fits; else the first that can be cut without leaving a single row; else the first."""
    rules: tuple[Callable[[int], bool], ...] = (
        lambda size: size <= space and space - size != 1,
        lambda size: size <= space,
        lambda size: space > 1 and size - space > 1,
    )
    return next((i for rule in rules for i, size in enumerate(sizes) if rule(size)), 0)

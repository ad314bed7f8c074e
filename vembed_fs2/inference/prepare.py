"""Prepares inputs in threads, while the inputs before them are encoded."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Final, TypeAlias

from typing_extensions import Self

from vembed_fs2.data.example import Item, Role
from vembed_fs2.data.loading import OrderedPool
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.processing.processor import Processor

Window: TypeAlias = Sequence[Item]
"""Inputs that are prepared together, and sorted by cost among themselves."""

WINDOW_ROWS: Final = 2048
"""The most inputs of a window."""

WINDOW_IMAGES: Final = 256
"""A window with this many images takes no further input: pixels take a thousand times the memory of a text."""

_MAX_THREADS: Final = 8

# Images are decoded this many rows per task, so that all threads end at about the same time.
_ROWS_PER_TASK: Final = 8


def cut_windows(items: Iterable[Item]) -> Iterator[Window]:
    """Cut a stream into windows of bounded size. Reads no input before a window that it belongs to is asked for."""
    window: list[Item] = []
    num_images = 0

    for item in items:
        window.append(item)

        num_images += len(item.images)
        if len(window) >= WINDOW_ROWS or num_images >= WINDOW_IMAGES:
            yield window
            window, num_images = [], 0

    if window:
        yield window


class PreparedWindows:
    """Makes a batch of each window, one window ahead of the caller.

    The caller's thread reads ``windows`` (an iterator may belong to its thread);
    threads decode, resize and tokenize. Use it in a ``with`` statement, whose end
    stops the threads:

    .. code:: python

        with PreparedWindows(windows, processor, role="query") as batches:
            for batch in batches:
                ...

    :param windows: may be endless; at most three of them are in memory.
    :param role: the side that the inputs stand on.
    :param prompt: put before each text; the prompt of the role if ``None``.
    """

    def __init__(
        self,
        windows: Iterable[Window],
        processor: Processor[Any],
        *,
        role: Role | None = None,
        prompt: str | None = None,
    ) -> None:
        self._windows = windows
        self._processor = processor
        self._role: Role | None = role
        self._prompt = prompt

        self._pool: OrderedPool | None = None
        self._stopped = threading.Event()
        self._next: Future[EncoderBatch] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[EncoderBatch]:
        """Yield the batch of each window.

        :raises DataError: an input cannot be read.
        """
        windows = iter(self._windows)

        window = next(windows, None)
        following = None if window is None else next(windows, None)

        # The usual query: there is nothing to overlap, and a thread would only delay it.
        if window is not None and following is None and len(_tasks(window)) == 1:
            yield self._collate([self._prepare(window)])
            return

        current = None if window is None else self._start(window)
        while current is not None:
            self._next = None if following is None else self._start(following)
            yield current.result()
            current, following = self._next, next(windows, None)

    def check(self) -> None:
        """Raise the error of the window ahead, if it has failed already."""
        if self._next is not None and self._next.done():
            self._next.result()

    def close(self) -> None:
        """Stop the threads after the inputs at hand."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.stop()
            self._pool = None

    def _start(self, window: Window) -> Future[EncoderBatch]:
        if self._pool is None:
            self._pool = OrderedPool(min(os.cpu_count() or 1, _MAX_THREADS), "vembed_prepare")

        parts = [self._pool.submit(self._prepare, task) for task in _tasks(window)]
        return self._pool.submit(self._join, parts)

    def _prepare(self, items: Window) -> list[Any]:
        prepared = []
        for item in items:
            if self._stopped.is_set():
                raise RuntimeError("The inputs are no longer wanted.")
            prepared.append(self._processor.prepare(item))
        return prepared

    def _join(self, parts: Sequence[Future[list[Any]]]) -> EncoderBatch:
        # Tasks are taken in order, so every part has a thread by now: this cannot wait for ever.
        return self._collate([part.result() for part in parts])

    def _collate(self, parts: Sequence[list[Any]]) -> EncoderBatch:
        if self._stopped.is_set():
            raise RuntimeError("The inputs are no longer wanted.")
        prepared = [item for part in parts for item in part]
        return self._processor.collate(prepared, role=self._role, prompt=self._prompt)


def _tasks(window: Window) -> list[Window]:
    """Cut a window with images into tasks for several threads. Texts are tokenized together, when all are there."""
    size = _ROWS_PER_TASK if any(item.images for item in window) else max(len(window), 1)
    return [window[start : start + size] for start in range(0, len(window), size)]

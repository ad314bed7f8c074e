"""Threads that load rows and make batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar

from vembed_fs2.data.example import Example
from vembed_fs2.errors import DataError

log = logging.getLogger("vembed_fs2")

BatchT = TypeVar("BatchT")

_ROWS_PER_TASK: Final = 8

_LOGGED_SKIPS: Final = 20

_Work: TypeAlias = tuple["Future[Any]", Callable[..., Any], tuple[object, ...]]


class Examples(Protocol):
    """A dataset: :class:`ExampleDataset`, a list, or the like."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Loader(Generic[BatchT]):
    """Turns row numbers into batches, in threads or (with none) in the caller's.

    :param load: prepares one row; ``None`` passes the example on.
    :param collate: makes a batch of prepared rows.
    :param skip: if ``True``, rows that raise :class:`DataError` are logged and left out.
    """

    skipped: set[int]
    """The rows that were left out."""

    def __init__(
        self,
        dataset: Examples,
        load: Callable[[Example], Any] | None,
        collate: Callable[[list[Any]], BatchT],
        *,
        skip: bool,
        num_threads: int,
    ) -> None:
        self.skipped = set()
        self._dataset = dataset
        self._load = load
        self._collate = collate
        self._skip = skip
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._pool = OrderedPool(num_threads, "vembed_data") if num_threads else None

    def start(self, rows: list[int]) -> Task[BatchT]:
        """Have a batch made."""
        if self._pool is None:
            return Task([], lambda: self._make_batch([self._load_rows(rows)]))

        groups = [rows[i : i + _ROWS_PER_TASK] for i in range(0, len(rows), _ROWS_PER_TASK)]
        parts = [self._pool.submit(self._load_rows, group) for group in groups]
        batch = self._pool.submit(self._join, parts)

        return Task([*parts, batch], batch.result)

    def stop(self) -> None:
        """Stop the threads after the rows at hand."""
        self._stopped.set()
        if self._pool is not None:
            self._pool.stop()

    def _join(self, parts: Sequence[Future[list[Any]]]) -> BatchT:
        # Threads take tasks in order: when this one runs, those that it waits for
        # have threads of their own already, so that it cannot wait for ever.
        return self._make_batch([part.result() for part in parts])

    def _load_rows(self, rows: Sequence[int]) -> list[Any]:
        loaded = []
        for row in rows:
            self._check_stopped()

            try:
                example = self._dataset[row]
                loaded.append(example if self._load is None else self._load(example))
            except DataError as ex:
                if not self._skip:
                    raise
                self._log_skip(row, ex)

        return loaded

    def _make_batch(self, parts: list[list[Any]]) -> BatchT:
        self._check_stopped()

        rows = [row for part in parts for row in part]
        if not rows:
            raise DataError("None of the rows of a batch can be used; the warnings above say why.")
        return self._collate(rows)

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise RuntimeError("The data reader is closed.")

    def _log_skip(self, row: int, error: DataError) -> None:
        with self._lock:
            if row in self.skipped:
                return
            self.skipped.add(row)
            count = len(self.skipped)

        if count <= _LOGGED_SKIPS:
            log.warning("A row is left out: %s", error)
        if count == _LOGGED_SKIPS:
            log.warning("Further rows that are left out are counted, but not logged.")


class Task(Generic[BatchT]):
    """A batch on its way."""

    def __init__(self, futures: Sequence[Future[Any]], result: Callable[[], BatchT]) -> None:
        self._futures = futures
        self.result = result

    def cancel(self) -> None:
        # The batch first: it must not find one of its parts cancelled.
        for future in reversed(self._futures):
            future.cancel()


class OrderedPool:
    """Threads that take tasks in order.

    Unlike the threads of ``ThreadPoolExecutor``, they do not make a program that
    ends, for example after an error, wait until everything ahead is loaded.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        names = (f"{name}_{i}" for i in range(num_threads))

        self._threads = [threading.Thread(target=_run, args=(self._work,), name=n, daemon=True) for n in names]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *args: object) -> Future[Any]:
        """Have ``function`` called after everything that was submitted before."""
        future: Future[Any] = Future()
        self._work.put((future, function, args))
        return future

    def stop(self) -> None:
        """Stop the threads after the tasks at hand."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():  # Which may be collecting garbage.
                thread.join(timeout=1)


def _run(queue: SimpleQueue[_Work | None]) -> None:
    while (work := queue.get()) is not None:
        future, function, args = work
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except BaseException as ex:
                future.set_exception(ex)

        # While it waits, a thread must not keep a batch, or the reader's parts, alive.
        del work, future, function, args

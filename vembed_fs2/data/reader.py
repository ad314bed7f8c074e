"""Batches of examples: shuffled, sharded over ranks, loaded ahead by threads, resumed exactly.

The order of an epoch depends on the seed and the number of the epoch alone (and, if
rows of one label are to stand together, on the labels and the global batch). A
global batch is the next ``world_size * batch_size`` rows of that order, and each
rank takes its contiguous share; so one process with 32 rows and two with 16 see
the same global batches, and a run can be resumed on another number of ranks.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from fairseq2.datasets import DataReader
from numpy.typing import NDArray
from typing_extensions import Self, override

from vembed_fs2.data.dataset import check_on_error
from vembed_fs2.data.example import Example
from vembed_fs2.data.loading import Examples, Loader, Task
from vembed_fs2.data.order import order_by_label
from vembed_fs2.errors import ConfigError, DataError

log = logging.getLogger("vembed_fs2")

BatchT = TypeVar("BatchT")


class EmbeddingDataReader(DataReader[BatchT]):
    """Reads batches for one rank.

    ``__next__`` returns a list of ``num_accumulate`` batches and raises
    ``StopIteration`` at the end of an epoch; :meth:`reset` then begins the next
    epoch, which has another order. All ranks have the same number of batches.

    :param dataset: the examples; read by several threads at once.
    :param collate: makes a batch of what ``load`` returned for its rows; runs in a thread.
    :param batch_size: the number of rows per batch and rank.
    :param seed: the seed of the order; the same on all ranks.
    :param shuffle: if ``False``, every epoch has the order of the dataset.
    :param drop_last: if ``True``, leaves out the rows at the end of an epoch that do
        not fill a global batch, and the batches that do not fill a step. If ``False``,
        they are split over the ranks as evenly as possible; only fewer rows than
        ranks are dropped.
    :param num_accumulate: the number of batches per step.
    :param num_workers: the number of threads; 0 loads in the caller's thread.
    :param prefetch: the number of batches that are loaded ahead.
    :param on_error: with ``skip``, a row for which the dataset or ``load`` raises
        :class:`DataError` is logged and left out: its batch is one row smaller,
        and no row changes its place.
    :param load: prepares one row, for example by decoding its images; runs in a thread.
    :param labels: the label of each row, as a number; 0 for none. *Shape:* ``[N]``.
    :param rows_per_label: the number of rows of a label that stand together (:func:`.order.order_by_label`); 0 for an
        order that knows no labels.
    :param files: the path of each data file and its fingerprint
        (:meth:`.dataset.ExampleDataset.fingerprints`). They are part of the state, and a file that
        has changed since then is an error.
    :raises ConfigError: an invalid argument.
    :raises DataError: the dataset has fewer rows than one step takes.
    """

    def __init__(
        self,
        dataset: Examples,
        collate: Callable[[list[Any]], BatchT],
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        num_accumulate: int = 1,
        num_workers: int = 2,
        prefetch: int = 2,
        on_error: str = "raise",
        load: Callable[[Example], Any] | None = None,
        labels: NDArray[np.int64] | None = None,
        rows_per_label: int = 0,
        files: Sequence[tuple[str, str]] = (),
    ) -> None:
        _check_arguments(batch_size, rank, world_size, seed, num_accumulate, num_workers, prefetch)
        check_on_error(on_error)
        self._plan = _Plan(len(dataset), batch_size, world_size, drop_last, num_accumulate)
        self._plan.check()
        self._files = [list(file) for file in files]
        self._rank = rank
        self._seed = seed
        self._shuffle = shuffle
        self._labels = labels
        self._rows_per_label = _check_rows_per_label(rows_per_label, labels, shuffle, self._plan)
        self._epoch = 0
        self._position = 0
        """The number of batches of this epoch that were returned."""

        self._order: NDArray[np.int64] | None = None
        self._prefetch = prefetch if num_workers else 0
        self._queue: deque[Task[BatchT]] = deque()
        self._loader = Loader(dataset, load, collate, skip=on_error == "skip", num_threads=num_workers)

        # The finalizer must not refer to `self`, or the reader would live for ever.
        self._finalizer = weakref.finalize(self, self._loader.stop)

    @override
    def __iter__(self) -> Self:
        return self

    @override
    def __next__(self) -> list[BatchT]:
        if not self._finalizer.alive:
            raise ValueError("The data reader is closed.")

        count = self._plan.batches_in_step(self._position)
        if count <= 0:
            raise StopIteration

        batches = []
        try:
            for i in range(count):
                self._submit(self._position + i)
                batches.append(self._queue.popleft().result())
        except BaseException:
            self._cancel()  # What was loaded ahead no longer begins at our position.
            raise

        self._position += count
        return batches

    def _submit(self, position: int) -> None:
        """Have the batch at ``position`` and those to be loaded ahead on their way."""
        end = min(position + 1 + self._prefetch, self._plan.num_batches)
        for i in range(position + len(self._queue), end):
            self._queue.append(self._loader.start(self._rows(i)))

    def _rows(self, batch: int) -> list[int]:
        if self._order is None:
            self._order = self._new_order()
        rows: list[int] = self._order[self._plan.share(batch, self._rank)].tolist()
        return rows

    def _new_order(self) -> NDArray[np.int64]:
        if self._labels is not None and self._rows_per_label:
            size = self._plan.global_batch_size
            return order_by_label(self._labels, self._rows_per_label, size, seed=self._seed, epoch=self._epoch)
        return _order_of(self._plan.num_rows, self._seed, self._epoch, self._shuffle)

    def _cancel(self) -> None:
        for task in self._queue:
            task.cancel()
        self._queue.clear()

    @override
    def reset(self) -> None:
        """Begin the next epoch; if nothing was read of this one yet, begin this one."""
        if self._position > 0:
            self._move(self._epoch + 1, 0)

    def _move(self, epoch: int, position: int) -> None:
        self._cancel()
        self._epoch, self._position, self._order = epoch, position, None

    def close(self) -> None:
        """Stop the threads. A closed reader cannot be read."""
        self._cancel()
        self._finalizer()

    @override
    def state_dict(self) -> dict[str, object]:
        """What :meth:`load_state_dict` needs to go on with the batch after the last one returned. Same on all ranks."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "rows_per_label": self._rows_per_label,
            "num_rows": self._plan.num_rows,
            "global_batch_size": self._plan.global_batch_size,
            "files": self._files,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on where the state was taken: with its seed, whatever ours was.

        :raises DataError: the state is of another dataset, global batch size or ``shuffle``, or a file has changed.
        """
        current = self.state_dict()
        state_dict = {"rows_per_label": 0, **state_dict}  # Older versions knew no labels.
        if missing := current.keys() - state_dict.keys() - {"files"}:
            raise DataError(f"The state of the data reader is not complete: {', '.join(sorted(missing))} missing.")

        # States of older versions name no files.
        self._check_files(state_dict.get("files", []))

        for key, what in _FIXED.items():
            if state_dict[key] != current[key]:
                raise DataError(
                    f"The run cannot be resumed: its {what} was {state_dict[key]}, but now it is {current[key]}."
                )

        epoch, position, seed = (_as_int(state_dict[key], key) for key in ("epoch", "position", "seed"))
        self._seed = seed
        self._move(epoch, position)

    def _check_files(self, files: Any) -> None:
        """Check that the data files are those that the state was taken with, wherever they are now."""
        if not files or not self._files:
            return

        if len(files) != len(self._files):
            raise DataError(
                f"The run cannot be resumed: it had {len(files)} data files, but now there are {len(self._files)}."
            )

        for (_, before), (path, now) in zip(files, self._files):
            if before != now:
                raise DataError(
                    f"The run cannot be resumed: {path} has changed since it began. Restore the file, or begin a new "
                    "run with `model.path` set to this one."
                )

    @property
    @override
    def num_accumulate(self) -> int:
        return self._plan.num_accumulate

    @property
    def steps_per_epoch(self) -> int:
        """The number of lists that an epoch yields."""
        return -(-self._plan.num_batches // self._plan.num_accumulate)

    @property
    def epoch(self) -> int:
        """The number of the current epoch, from 0."""
        return self._epoch

    @property
    def num_skipped(self) -> int:
        """The number of rows of this rank that were found to be broken and left out."""
        return len(self._loader.skipped)


@dataclass(frozen=True)
class _Plan:
    """Which rows of an epoch's order belong to which batch of which rank."""

    num_rows: int
    batch_size: int
    world_size: int
    drop_last: bool
    num_accumulate: int

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.world_size

    @property
    def num_batches(self) -> int:
        """The number of batches per rank and epoch."""
        full, rest = divmod(self.num_rows, self.global_batch_size)
        if self.drop_last:
            return full - full % self.num_accumulate
        return full + (rest >= self.world_size)

    def check(self) -> None:
        if self.num_batches == 0:
            if not self.drop_last:
                raise DataError(f"{self.world_size:,} ranks need a row each, but the dataset has {self.num_rows:,}.")

            raise DataError(
                f"One step takes {self.global_batch_size * self.num_accumulate:,} rows ({self.batch_size:,} rows x "
                f"{self.world_size:,} ranks x {self.num_accumulate:,} batches), but the dataset has "
                f"{self.num_rows:,}. Make the batch smaller."
            )

        rest = self.num_rows % self.global_batch_size
        if not self.drop_last and 0 < rest < self.world_size:
            log.warning("The last %d rows of each epoch are dropped: they are fewer than the ranks.", rest)

    def batches_in_step(self, position: int) -> int:
        left = self.num_batches - position
        # A run that was resumed with another `num_accumulate` can be between two steps.
        return 0 if self.drop_last and left < self.num_accumulate else min(self.num_accumulate, left)

    def share(self, batch: int, rank: int) -> slice:
        start = batch * self.global_batch_size
        rows = min(self.global_batch_size, self.num_rows - start)
        size, more = divmod(rows, self.world_size)
        start += rank * size + min(rank, more)
        return slice(start, start + size + (rank < more))


_FIXED: Final = {
    "num_rows": "number of rows",
    "global_batch_size": "global batch size (rows per rank x ranks)",
    "shuffle": "shuffle",
    "rows_per_label": "number of rows per label",
}


def _order_of(num_rows: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    if not shuffle:
        return np.arange(num_rows)

    # NumPy promises the raw numbers of Philox for all versions, but not `Generator.permutation`.
    numbers = np.random.Philox(key=[seed, epoch]).random_raw(num_rows)
    return np.argsort(numbers, kind="stable")


def _check_rows_per_label(count: int, labels: NDArray[np.int64] | None, shuffle: bool, plan: _Plan) -> int:
    if count == 0:
        return 0
    if labels is None or len(labels) != plan.num_rows:
        raise ConfigError("`rows_per_label` needs the label of each row.", where="The data reader's configuration")
    if not shuffle:
        raise ConfigError("`rows_per_label` needs `shuffle`.", where="The data reader's configuration")
    if not 2 <= count <= plan.global_batch_size:
        text = f"`rows_per_label` must be from 2 to the {plan.global_batch_size:,} rows of a batch, but is {count}."
        raise ConfigError(text, where="The data reader's configuration")

    return count


def _as_int(value: object, key: str) -> int:
    if not isinstance(value, int):
        raise DataError(f"The state of the data reader is broken: {key!r} is {value!r}.")
    return value


def _check_arguments(
    batch_size: int, rank: int, world_size: int, seed: int, num_accumulate: int, num_workers: int, prefetch: int
) -> None:
    errors = []
    for name, value in (("batch_size", batch_size), ("world_size", world_size), ("num_accumulate", num_accumulate)):
        if value < 1:
            errors.append(f"`{name}` must be positive, but is {value}.")

    for name, value in (("seed", seed), ("num_workers", num_workers), ("prefetch", prefetch)):
        if value < 0:
            errors.append(f"`{name}` must not be negative, but is {value}.")

    if seed >= 2**63:
        errors.append(f"`seed` must be less than 2**63, but is {seed}.")
    if not 0 <= rank < world_size:
        errors.append(f"`rank` must be less than `world_size` ({world_size}), but is {rank}.")
    if errors:
        raise ConfigError(errors, where="The data reader's configuration")

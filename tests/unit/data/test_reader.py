"""The reader: order, sharding, resume, skipping, threads."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.example import Example, Item
from vembed_fs2.data.reader import EmbeddingDataReader
from vembed_fs2.errors import ConfigError, DataError

Batch = list[int]


def examples(count: int) -> list[Example]:
    return [Example(Item(str(i)), Item(f"p{i}")) for i in range(count)]


def numbers(rows: list[Example]) -> Batch:
    for row in rows:
        assert row.positive is not None
        assert row.positive.text == f"p{row.query.text}"
    return [int(row.query.text or "") for row in rows]


def reader(count: int = 100, **options: Any) -> EmbeddingDataReader[Batch]:
    return EmbeddingDataReader(examples(count), numbers, **{"batch_size": 8, "seed": 2, **options})


def flat(steps: list[list[Batch]]) -> list[int]:
    return [row for step in steps for batch in step for row in batch]


def join(ranks: list[list[list[Batch]]]) -> list[list[Batch]]:
    """The global batches that ranks have seen together."""
    return [[[row for part in parts for row in part] for parts in zip(*step)] for step in zip(*ranks)]


def epochs(data: EmbeddingDataReader[Batch], count: int) -> list[list[list[Batch]]]:
    out = []
    for _ in range(count):
        out.append(list(data))
        data.reset()
    data.close()
    return out


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    first, second, third = (flat(e) for e in epochs(reader(96), 3))
    assert sorted(first) == sorted(second) == sorted(third) == list(range(96))
    assert len({tuple(first), tuple(second), tuple(third), tuple(range(96))}) == 4
    assert flat(epochs(reader(96), 1)[0]) == first
    assert flat(epochs(reader(96, seed=3), 1)[0]) != first


def test_the_order_never_changes() -> None:
    assert flat(epochs(reader(8), 1)[0]) == [1, 4, 0, 6, 3, 5, 2, 7]


def test_without_shuffling() -> None:
    assert [flat(e) for e in epochs(reader(20, shuffle=False, drop_last=False), 2)] == [list(range(20))] * 2


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("num_accumulate", [1, 3])
def test_ranks_share_the_batches_of_one_process(world_size: int, drop_last: bool, num_accumulate: int) -> None:
    options = {"drop_last": drop_last, "num_accumulate": num_accumulate}
    single = epochs(reader(337, batch_size=32, **options), 2)
    ranks = [
        epochs(reader(337, batch_size=32 // world_size, world_size=world_size, rank=r, **options), 2)
        for r in range(world_size)
    ]
    for epoch in range(2):
        joined = join([rank[epoch] for rank in ranks])
        assert joined == single[epoch]
        assert len({len(rank[epoch]) for rank in ranks}) == 1


def test_the_last_batch_is_split_evenly() -> None:
    sizes = [
        [len(b) for s in epochs(reader(22, world_size=2, rank=r, drop_last=False), 1)[0] for b in s] for r in (0, 1)
    ]
    assert sizes == [[8, 3], [8, 3]]
    sizes = [
        [len(b) for s in epochs(reader(19, world_size=2, rank=r, drop_last=False), 1)[0] for b in s] for r in (0, 1)
    ]
    assert sizes == [[8, 2], [8, 1]]


def test_fewer_rows_than_ranks_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vembed_fs2"):
        steps = epochs(reader(18, batch_size=2, world_size=4, drop_last=False), 1)[0]
    assert [len(b) for s in steps for b in s] == [2, 2]
    assert "The last 2 rows of each epoch are dropped" in caplog.text


def test_accumulation() -> None:
    data = reader(60, num_accumulate=3)
    assert (data.num_accumulate, data.steps_per_epoch) == (3, 2)
    assert [[len(b) for b in s] for s in epochs(data, 1)[0]] == [[8] * 3] * 2
    data = reader(60, num_accumulate=3, drop_last=False)
    assert data.steps_per_epoch == 3
    assert [[len(b) for b in s] for s in epochs(data, 1)[0]] == [[8] * 3, [8] * 3, [8, 4]]


def test_epochs_end_until_reset() -> None:
    data = reader(16)
    data.reset()
    assert (data.epoch, data.steps_per_epoch) == (0, 2)
    assert len(list(data)) == 2
    assert list(data) == []
    data.reset()
    data.reset()
    assert data.epoch == 1
    assert len(list(data)) == 2
    data.close()


@settings(max_examples=40)
@given(
    steps=st.integers(0, 25),
    workers=st.integers(0, 3),
    prefetch=st.integers(0, 4),
    num_accumulate=st.integers(1, 3),
    drop_last=st.booleans(),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_resume_is_exact(
    steps: int, workers: int, prefetch: int, num_accumulate: int, drop_last: bool, world_size: int
) -> None:
    options = {"num_accumulate": num_accumulate, "drop_last": drop_last}

    def run(data: EmbeddingDataReader[Batch], count: int) -> list[list[Batch]]:
        out: list[list[Batch]] = []
        while len(out) < count:  # As fairseq2's trainer does.
            try:
                out.append(next(data))
            except StopIteration:
                data.reset()
        return out

    before = reader(61, num_workers=workers, prefetch=prefetch, **options)
    run(before, steps)
    state = before.state_dict()
    expected = run(before, 12)
    before.close()

    ranks = []
    for rank in range(world_size):
        after = reader(61, batch_size=8 // world_size, world_size=world_size, rank=rank, seed=99, **options)
        next(after)  # What was loaded ahead must not be returned.
        after.load_state_dict(dict(state))
        assert after.state_dict() == state
        ranks.append(run(after, 12))
        after.close()
    assert join(ranks) == expected


def test_resume_at_the_end_of_an_epoch() -> None:
    data = reader(16)
    list(data)
    state = data.state_dict()
    data.reset()
    expected = next(data)
    resumed = reader(16)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    resumed.reset()
    assert next(resumed) == expected


def test_resume_with_another_number_of_batches_per_step() -> None:
    data = reader(96)
    steps = [next(data) for _ in range(3)]
    resumed = reader(96, num_accumulate=2)
    resumed.load_state_dict(data.state_dict())
    rest = list(resumed)
    assert [len(s) for s in rest] == [2] * 4
    assert flat(steps) + flat(rest) == flat(list(reader(96)))[:88]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 101}, "its number of rows was 100, but now it is 101"),
        ({"batch_size": 4}, r"its global batch size \(rows per rank x ranks\) was 8, but now it is 4"),
        ({"world_size": 2}, r"its global batch size .* was 8, but now it is 16"),
        ({"shuffle": False}, "its shuffle was True, but now it is False"),
    ],
)
def test_states_of_other_data_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"cannot be resumed: {message}"):
        reader(**options).load_state_dict(reader().state_dict())


def write_rows(file: Path, names: Sequence[str]) -> None:
    rows = [{"query": name, "positive": name} for name in names]
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            file.write_text(json.dumps(rows))
        case ".csv":
            file.write_text("query,positive\n" + "".join(f"{name},{name}\n" for name in names))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)


def state_of(path: Path) -> EmbeddingDataReader[list[str]]:
    dataset = ExampleDataset(path)
    return EmbeddingDataReader(dataset, lambda rows: [], batch_size=2, files=dataset.fingerprints())


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_file_that_changed_since_the_state_was_taken_is_named(tmp_path: Path, suffix: str) -> None:
    names = ["one", "two", "three", "four"]
    for part in ("a", "b"):
        write_rows(tmp_path / f"{part}.{suffix}", names)
    state = state_of(tmp_path).state_dict()
    state_of(tmp_path).load_state_dict(state)

    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved)
    state_of(moved).load_state_dict(state)

    write_rows(tmp_path / f"b.{suffix}", ["one", "two", "three", "fourteen" * 9])
    with pytest.raises(DataError, match=rf"b\.{suffix} has changed since it began"):
        state_of(tmp_path).load_state_dict(state)

    write_rows(tmp_path / f"b.{suffix}", names[:3])
    with pytest.raises(DataError, match=rf"b\.{suffix} has changed since it began"):
        state_of(tmp_path).load_state_dict(state)

    (tmp_path / f"b.{suffix}").unlink()
    with pytest.raises(DataError, match="had 2 data files, but now there are 1"):
        state_of(tmp_path).load_state_dict(state)


def test_a_state_without_files_is_resumed(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ["one", "two"])
    state = state_of(tmp_path).state_dict()
    del state["files"]
    state_of(tmp_path).load_state_dict(state)


def test_broken_states_are_refused() -> None:
    with pytest.raises(DataError, match="not complete: epoch, "):
        reader().load_state_dict({})
    with pytest.raises(DataError, match="'epoch' is 'x'"):
        reader().load_state_dict({**reader().state_dict(), "epoch": "x"})


def test_too_few_rows_is_an_error_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"takes 32 rows \(8 rows x 2 ranks x 2 batches\), but the dataset has 31"):
        reader(31, world_size=2, num_accumulate=2)
    assert reader(31, world_size=2, num_accumulate=2, drop_last=False).steps_per_epoch == 1
    with pytest.raises(DataError, match="but the dataset has 1"):
        reader(1, world_size=2, drop_last=False)


def test_bad_arguments_are_listed_together() -> None:
    with pytest.raises(ConfigError) as info:
        reader(batch_size=0, rank=2, world_size=2, seed=-1, prefetch=-1)
    assert len(info.value.errors) == 4


def failing(bad: set[int]) -> Callable[[Example], Example]:
    def load(example: Example) -> Example:
        if int(example.query.text or "") in bad:
            raise DataError(f"row {example.query.text}: the image is broken")
        return example

    return load


@pytest.mark.parametrize("num_workers", [0, 3])
def test_skipped_rows_make_the_batch_smaller_and_shift_nothing(
    num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {3, 50, 51}
    expected = [[[row for row in batch if row not in bad] for batch in step] for step in list(reader())]
    data = reader(num_workers=num_workers, on_error="skip", load=failing(bad))
    with caplog.at_level(logging.WARNING, "vembed_fs2"):
        assert list(data) == expected  # `numbers` checks that positives stay with their queries.
        data.reset()
        list(data)
    found = data.num_skipped
    assert found == sum(f"row {b}: the image is broken" in caplog.text for b in bad) == len(caplog.records)
    data.close()


def test_a_batch_without_usable_rows_is_an_error() -> None:
    with pytest.raises(DataError, match="None of the rows of a batch can be used"):
        next(reader(on_error="skip", load=failing(set(range(100)))))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_reach_the_consumer_in_turn_and_can_be_retried(num_workers: int) -> None:
    bad: set[int] = set()
    expected = list(reader())
    bad.add(expected[2][0][5])
    data = reader(num_workers=num_workers, prefetch=5, load=failing(bad))
    assert [next(data), next(data)] == expected[:2]
    state = data.state_dict()
    for _ in range(2):
        with pytest.raises(DataError, match="the image is broken"):
            next(data)
    assert data.state_dict() == state
    bad.clear()
    assert list(data) == expected[2:]
    data.close()


def test_results_come_in_order_whatever_the_threads_do() -> None:
    def slow(example: Example) -> Example:
        time.sleep((int(example.query.text or "") * 7919 % 5) / 2000)
        return example

    data = reader(batch_size=20, num_workers=8, prefetch=3, load=slow)
    assert list(data) == list(reader(batch_size=20))
    data.close()


def test_one_thread_is_enough() -> None:
    assert list(reader(batch_size=50, num_workers=1, prefetch=4)) == list(reader(batch_size=50))


def test_prefetching_is_bounded() -> None:
    made: list[int] = []

    def collate(rows: list[Example]) -> Batch:
        made.append(len(rows))
        return numbers(rows)

    data = EmbeddingDataReader(examples(400), collate, batch_size=4, num_workers=4, prefetch=3)
    next(data)
    time.sleep(0.1)
    assert len(made) == 4
    data.close()


def threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("vembed_data")}


def test_close_stops_the_threads() -> None:
    before = threads()
    data = reader(num_workers=3, prefetch=4)
    next(data)
    assert threads() - before
    data.close()
    data.close()
    assert threads() == before
    with pytest.raises(ValueError, match="closed"):
        next(data)


def test_garbage_collection_stops_the_threads() -> None:
    before = threads()
    data = reader(num_workers=3, prefetch=4)
    next(data)
    ref = weakref.ref(data)
    del data
    gc.collect()
    assert ref() is None
    assert threads() == before


def test_an_error_ends_the_program_at_once() -> None:
    code = """
import time
from vembed_fs2.data.reader import EmbeddingDataReader

loaded = []

def load(row):
    loaded.append(row)
    time.sleep(len(loaded) > 100)

data = EmbeddingDataReader(range(1000), len, batch_size=100, prefetch=9, load=load)
next(data)
raise SystemExit(3)
"""
    begin = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 3
    assert time.monotonic() - begin < 30

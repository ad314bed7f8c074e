"""The encode loop: order, windows, overlap, errors and threads, without files or tokenizers."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

from tests.distributed.steps import BERT, create_model, texts
from vembed_fs2.data.example import Item, Role
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.inputs import ImageInputs, TextInputs
from vembed_fs2.embedding.model import EmbeddingModel, Embeddings, HeadConfig
from vembed_fs2.errors import DataError
from vembed_fs2.inference import prepare
from vembed_fs2.inference.encoder import Encoded, Encoder
from vembed_fs2.inference.prepare import PreparedWindows, cut_windows
from vembed_fs2.processing.processor import Processor

TIMEOUT = 20


class Words(Processor[list[int]]):
    """Texts are numbers: a text of the number n has n % 7 + 1 tokens, all of them n."""

    def __init__(self) -> None:
        super().__init__()
        self.prepared: list[int] = []
        self.collated: list[tuple[int, Role | None, str | None]] = []

    def prepare(self, item: Item) -> list[int]:
        number = int(item.text or 0)
        self.prepared.append(number)
        return [number] * (number % 7 + 1)

    def collate(
        self, prepared: Sequence[list[int]], *, role: Role | None = None, prompt: str | None = None
    ) -> EncoderBatch:
        self.collated.append((len(prepared), role, prompt))
        width = max(map(len, prepared))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in prepared])
        mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in prepared])
        return EncoderBatch.of_text(ids, mask)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


class FirstToken(EmbeddingModel):
    """The embedding of a text is its first token."""

    modalities = frozenset({"text"})
    embedding_dim = 1
    similarity = "cosine"

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.dropout = torch.nn.Dropout()
        self.shapes: list[tuple[int, ...]] = []
        self.was_training: list[bool] = []

    def encode_rows(self, batch: EncoderBatch) -> Any:
        assert batch.text is not None
        self.shapes.append(tuple(batch.text.input_ids.shape))
        self.was_training.append(self.training or self.dropout.training)
        return (batch.text.input_ids[:, :1] * self.weight).float(), None

    def layer_stacks(self) -> list[Any]:
        return []


def numbers(count: int) -> Iterator[Item]:
    return (Item(text=str(i)) for i in range(count))


def values_of(encoded: Iterator[Encoded]) -> dict[int, float]:
    return {row: float(v) for rows, e in encoded for row, v in zip(rows, e.values[:, 0])}


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("vembed_prepare")]


def wait_for_threads() -> None:
    end = time.monotonic() + TIMEOUT
    while threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert threads() == []


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(prepare, "WINDOW_ROWS", 10)
    monkeypatch.setattr(prepare, "WINDOW_IMAGES", 3)
    yield
    wait_for_threads()


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 20, 35])
def test_each_input_has_its_own_embedding(count: int) -> None:
    encoder = Encoder(FirstToken(), Words())
    assert values_of(encoder.encode(numbers(count))) == {i: i for i in range(count)}


def test_expensive_rows_come_first_in_each_window_and_batches_are_bounded() -> None:
    model = FirstToken()
    rows = [rows for rows, _ in Encoder(model, Words(), chunk_tokens=14).encode(numbers(20), batch_size=3)]
    assert sorted(itertools.chain(*rows)) == list(range(20))
    assert all(n * width <= 14 and n <= 3 for n, width in model.shapes)
    for window in (range(10), range(10, 20)):
        order = [row for part in rows for row in part if row in window]
        assert order == sorted(window, key=lambda i: (-(i % 7), i))


def test_role_and_prompt_reach_the_processor() -> None:
    words = Words()
    list(Encoder(FirstToken(), words).encode(numbers(12), role="query", prompt="find: "))
    list(Encoder(FirstToken(), words).encode(numbers(2), role="document"))
    assert words.collated == [(10, "query", "find: "), (2, "query", "find: "), (2, "document", None)]


def test_windows_are_bounded_in_inputs_and_in_images() -> None:
    def item(i: int) -> Item:
        return Item(text="x", images=(b"i",)) if i % 4 == 0 else Item(text="x")

    assert [len(w) for w in cut_windows(numbers(25))] == [10, 10, 5]
    assert [len(w) for w in cut_windows(map(item, range(20)))] == [9, 10, 1]
    assert [len(w) for w in cut_windows([Item(images=(b"i",))] * 7)] == [3, 3, 1]
    assert [len(w) for w in cut_windows([Item(images=(b"i",) * 5)] * 2)] == [1, 1]
    assert list(cut_windows([])) == []


class Watched(Words):
    """Tells when the second window is prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.second = threading.Event()

    def prepare(self, item: Item) -> list[int]:
        if item.text == "10":
            self.second.set()
        return super().prepare(item)


def test_the_second_window_is_prepared_while_the_first_is_encoded() -> None:
    words, seen = Watched(), []

    class Waiting(FirstToken):
        def encode_rows(self, batch: EncoderBatch) -> Any:
            # Nothing sets the event after the first window is encoded: without overlap, this waits in vain.
            seen.append(words.second.wait(TIMEOUT))
            return super().encode_rows(batch)

    assert values_of(Encoder(Waiting(), words).encode(numbers(20))) == {i: i for i in range(20)}
    assert all(seen)


def test_an_endless_stream_is_read_one_window_ahead() -> None:
    read = 0

    def endless() -> Iterator[Item]:
        nonlocal read
        caller = threading.current_thread()
        for i in itertools.count():
            assert threading.current_thread() is caller
            read += 1
            yield Item(text=str(i))

    encoded = Encoder(FirstToken(), Words()).encode(endless())
    seen = 0
    while seen < 100:
        seen += len(next(encoded)[0])
        assert read <= (seen - 1) // 10 * 10 + 20
    assert threads()
    encoded.close()  # type: ignore[attr-defined]
    wait_for_threads()


def test_a_stream_that_is_left_stops_its_threads() -> None:
    encoded = Encoder(FirstToken(), Words()).encode(numbers(1000))
    next(encoded)
    assert threads()
    del encoded
    gc.collect()
    wait_for_threads()


def test_closing_does_not_wait_for_the_rest_of_a_window() -> None:
    started, go_on = threading.Event(), threading.Event()

    class Stuck(Words):
        def prepare(self, item: Item) -> list[int]:
            if item.text == "12":
                started.set()
                assert go_on.wait(TIMEOUT)
            return super().prepare(item)

    words = Stuck()
    encoded = Encoder(FirstToken(), words).encode(numbers(1000))
    next(encoded)
    assert started.wait(TIMEOUT)
    encoded.close()  # type: ignore[attr-defined]
    go_on.set()
    wait_for_threads()
    assert max(words.prepared) == 12


@pytest.mark.parametrize("broken", [3, 10, 17, 29])
def test_an_error_of_the_stream_is_raised(broken: int) -> None:
    def failing() -> Iterator[Item]:
        for i in range(30):
            if i == broken:
                raise OSError("the disk is gone")
            yield Item(text=str(i))

    with pytest.raises(OSError, match="the disk is gone"):
        list(Encoder(FirstToken(), Words()).encode(failing()))
    wait_for_threads()


@pytest.mark.parametrize("broken", ["3", "10", "17", "29"])
@pytest.mark.parametrize("step", ["prepare", "collate"])
def test_an_error_of_the_processor_is_raised(broken: str, step: str) -> None:
    class Failing(Words):
        def prepare(self, item: Item) -> list[int]:
            if step == "prepare" and item.text == broken:
                raise DataError(f"row {broken} is broken")
            return super().prepare(item)

        def collate(self, prepared: Sequence[list[int]], **kwargs: Any) -> EncoderBatch:
            if step == "collate" and any(int(broken) in tokens for tokens in prepared):
                raise DataError(f"row {broken} is broken")
            return super().collate(prepared, **kwargs)

    model = FirstToken().train()
    with pytest.raises(DataError, match=f"row {broken} is broken"):
        list(Encoder(model, Failing()).encode(numbers(30)))
    assert model.dropout.training
    wait_for_threads()


def test_an_error_ahead_stops_the_window_that_is_encoded() -> None:
    failed = threading.Event()

    class Failing(Words):
        def collate(self, prepared: Sequence[list[int]], **kwargs: Any) -> EncoderBatch:
            if prepared[0][0] == 10:
                failed.set()
                raise DataError("broken")
            return super().collate(prepared, **kwargs)

    class Slow(FirstToken):
        def encode_rows(self, batch: EncoderBatch) -> Any:
            assert failed.wait(TIMEOUT)
            time.sleep(0.1)  # The error reaches the future just after the event.
            return super().encode_rows(batch)

    model = Slow()
    with pytest.raises(DataError, match="broken"):
        list(Encoder(model, Failing()).encode(numbers(20), batch_size=1))
    assert len(model.shapes) < 10


def test_an_error_of_the_model_stops_the_threads() -> None:
    class Failing(FirstToken):
        def encode_rows(self, batch: EncoderBatch) -> Any:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(Encoder(Failing(), Words()).encode(numbers(30)))
    wait_for_threads()


def test_the_model_is_in_its_own_mode_between_results() -> None:
    model = FirstToken().train()
    frozen: Module = model.dropout.eval()
    for _ in Encoder(model, Words(), autocast_dtype=torch.bfloat16).encode(numbers(30)):
        assert model.training
        assert not frozen.training
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
    assert not any(model.was_training)


def test_embeddings_are_ordinary_tensors() -> None:
    model = create_model(replace(BERT, head=HeadConfig())).train()
    for _, embeddings in Encoder(model).encode_batch(texts(7, 3)):
        assert not embeddings.values.is_inference()
        assert not embeddings.values.requires_grad
        (embeddings.values * torch.ones(1, requires_grad=True)).sum().backward()


def test_a_batch_is_encoded_as_its_rows_are_one_by_one() -> None:
    batch, model = texts(9, 3), create_model(BERT).eval()
    expected = torch.cat([model(batch.select([i])).values for i in range(9)]).detach()
    encoded = Encoder(model, chunk_tokens=20).encode_batch(batch)
    assert len(encoded) > 1
    for rows, embeddings in encoded:
        torch.testing.assert_close(embeddings.values, expected[rows])


def test_what_finishes_embeddings_is_applied_to_each_forward_pass() -> None:
    model, sizes = FirstToken(), []

    def finish(embeddings: Embeddings) -> Embeddings:
        sizes.append(len(embeddings.values))
        return Embeddings(embeddings.values + 100)

    encoder = Encoder(model, Words())
    assert values_of(encoder.encode(numbers(12), finish=finish)) == {i: i + 100 for i in range(12)}
    assert sizes == [n for n, _ in model.shapes]


class Pictures(Processor[Tensor]):
    """Decodes an image only when another thread decodes one as well."""

    def __init__(self, parties: int) -> None:
        super().__init__()
        self.barrier = threading.Barrier(parties)

    def prepare(self, item: Item) -> Tensor:
        if item.text == "meet":
            self.barrier.wait(TIMEOUT)
        return torch.zeros(3, 2, 2)

    def collate(self, prepared: Sequence[Tensor], *, role: Role | None = None, prompt: str | None = None) -> Any:
        ids = torch.ones(len(prepared), 1, dtype=torch.int64)
        rows = torch.arange(len(prepared))
        return EncoderBatch(len(prepared), TextInputs.from_padded(ids), ImageInputs(torch.stack(list(prepared)), rows))

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def test_images_are_decoded_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_ROWS_PER_TASK", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    items = [Item(text="meet" if i in (0, 2) else "alone", images=(b"i",)) for i in range(4)]
    with PreparedWindows([items], Pictures(2)) as batches:
        assert [batch.num_rows for batch in batches] == [4]

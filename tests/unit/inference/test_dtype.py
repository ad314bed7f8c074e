"""Embedders with weights of other types than float32: what is loaded, returned and written."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.unit.inference.test_embedder import MINILM, TEXTS
from vembed_fs2 import Embedder, dtypes, load_model
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.errors import VembedError


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(folder)
    return folder


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("float32", torch.float32)]
)
def test_weights_are_of_the_type_that_is_asked_for(
    clip_folder: Path, dtype: str | torch.dtype, expected: torch.dtype
) -> None:
    embedder = Embedder.load(clip_folder, device="cpu", dtype=dtype)
    assert embedder.dtype == expected
    types = {p.dtype for name, p in embedder.model.named_parameters() if name != "logit_scale"}
    assert types == {expected}
    assert {p.dtype for p in load_model(clip_folder, dtype=dtype).text.parameters()} == {expected}  # type: ignore[union-attr]


def test_the_default_is_float32_on_any_processor(clip_folder: Path) -> None:
    with patch.object(dtypes, "has_bfloat16_products", lambda: True):
        assert Embedder.load(clip_folder, device="cpu").dtype == torch.float32
        assert Embedder.load(clip_folder, device="cpu", dtype="auto").dtype == torch.bfloat16
    with patch.object(dtypes, "has_bfloat16_products", lambda: False):
        assert Embedder.load(clip_folder, device="cpu", dtype="auto").dtype == torch.float32


def test_a_wrong_type_is_an_error_before_the_model_is_looked_for() -> None:
    with pytest.raises(VembedError, match=r"`dtype` must be one of auto, .* Did you mean 'bfloat16'"):
        Embedder.load("missing", device="cpu", dtype="bfloat")
    with pytest.raises(VembedError, match="`dtype` must be one of auto"):
        load_model("missing", dtype=torch.int32)


@pytest.fixture(scope="module")
def half() -> Embedder:
    return Embedder.load(MINILM, device="cpu", dtype="bfloat16")


def test_embeddings_are_float32_and_close(half: Embedder) -> None:
    vectors = half.encode(TEXTS[:8])
    assert vectors.dtype == np.float32
    expected = Embedder.load(MINILM, device="cpu").encode(TEXTS[:8])
    assert (vectors * expected).sum(1).min() >= 0.9995
    assert half.similarity(vectors[:2], vectors[2:4]).dtype == np.float32
    assert half.encode("x", convert_to_tensor=True).dtype == torch.float32
    assert next(half.encode_stream(["x"])).dtype == np.float32


def test_a_text_has_the_same_embedding_whatever_else_is_encoded(half: Embedder) -> None:
    """The texts are of 1 to 256 tokens."""
    alone = np.concatenate([half.encode([text]) for text in TEXTS[:4]])
    assert (alone * half.encode(TEXTS[:8])[:4]).sum(1).min() >= 0.9999


def test_the_temperature_stays_float32(clip_folder: Path, tmp_path: Path) -> None:
    """bfloat16 would make 2.65625 of 2.6592."""
    half = Embedder.load(clip_folder, device="cpu", dtype="bfloat16")
    expected = load_model(clip_folder).logit_scale
    assert torch.equal(half.model.logit_scale, expected)  # type: ignore[arg-type]
    assert not torch.equal(expected, expected.bfloat16().float())  # type: ignore[union-attr]
    half.save(tmp_path / "out", "hf")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["logit_scale"].flatten(), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["hf", "sentence-transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_says_its_type(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str, dtype: str
) -> None:
    with caplog.at_level(logging.WARNING, "vembed_fs2"):
        Embedder.load(MINILM, device="cpu", dtype=dtype).save(tmp_path / "out", layout)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    assert AutoModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)
    warnings = ["The weights are written as they were loaded, in bfloat16."] if dtype == "bfloat16" else []
    assert caplog.messages == warnings


def test_loading_takes_the_memory_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is twice as large as the model: a tensor is rounded before the next is read."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    load_memory = importlib.import_module("load_memory")

    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "vocab_size": 20_000}
    load_memory.write_checkpoint(tmp_path, "Bert", {**sizes, "num_hidden_layers": 8}, None)
    load_model(tmp_path, dtype="bfloat16")  # What is imported and cached meanwhile is not the model's.

    with load_memory.watched() as peak:
        model = load_model(tmp_path, dtype="bfloat16")
    held = sum(p.nbytes for p in model.parameters())
    assert held > 64 * 2**20
    assert peak[0] <= 1.25 * held

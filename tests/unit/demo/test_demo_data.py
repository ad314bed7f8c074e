"""The data of the demos: what is written, that nothing leaks, and that others can load it."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vembed_fs2.data.example import Item
from vembed_fs2.demo import images, table, text
from vembed_fs2.errors import DataError, VembedError
from vembed_fs2.evaluation import task_from_files

torch.set_num_threads(1)


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


ROOTS = list(text._roots())

# Text


def test_a_docstring_becomes_its_first_paragraph_and_the_rest() -> None:
    rest = "It takes a list of things\n    and does what must be done with each. " + "More words. " * 10
    pair = text.split_docstring(f"""Do something useful
        with many things.

        {rest}

        The end.
        """)
    assert pair is not None
    assert pair[0] == "Do something useful with many things."
    assert pair[1].startswith("It takes a list of things\n")
    assert pair[1].endswith("The end.")
    with_signature = text.split_docstring(f"f(a, *,\n  b) -> Tensor\n\nDo something useful with it.\n\n{rest}")
    assert with_signature is not None
    assert with_signature[0] == "Do something useful with it."
    heading = text.split_docstring(f"The title of a module\n=====================\n\n{rest}")
    assert heading is not None
    assert heading[0] == "The title of a module"
    long = text.split_docstring("Do something very useful.\n\n" + "word " * 2000)
    assert long is not None
    assert len(long[1]) == text.DOCUMENT_LENGTH[1]


@pytest.mark.parametrize(
    "docstring",
    ["", "One paragraph only, of some length.", "Too short.\n\n" + "x" * 200, "Long enough a query.\n\nshort rest"],
)
def test_docstrings_of_no_use_are_left_out(docstring: str) -> None:
    assert text.split_docstring(docstring) is None


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(" ".join), max_size=12),
    st.sampled_from((0.5, 0.8)),
)
def test_near_duplicates_are_the_components_of_all_similar_pairs(texts: list[str], threshold: float) -> None:
    def triples(words: list[str]) -> set[str]:
        return {" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}

    sets = [triples(t.split()) for t in texts]
    group = list(range(len(texts)))
    for i, a in enumerate(sets):
        for j, b in enumerate(sets[:i]):
            if len(a & b) / len(a | b) >= threshold:
                group = [group[j] if g == group[i] else g for g in group]
    expected = {frozenset(i for i, g in enumerate(group) if g == name) for name in group}
    assert {frozenset(g) for g in text.near_duplicates(texts, threshold=threshold)} == expected


def test_short_documents_are_trained_on_only() -> None:
    pairs = [{"query": f"q{i}", "positive": f"word{i} " * (20 if i % 2 else 80)} for i in range(60)]
    train, held_out = text.split_pairs(pairs, num_held_out=20)
    assert {len(row["positive"]) >= text.HELD_OUT_LENGTH for row in held_out} == {True}
    assert len(train) + len(held_out) == len(pairs)


def test_near_duplicates_fall_on_the_same_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "HELD_OUT_LENGTH", 1)
    words = [f"{chr(97 + i % 26)}{i}" for i in range(400)]
    pairs = []
    for i in range(0, 120, 3):
        shared = " ".join(words[i : i + 60])
        pairs += [{"query": f"q{i} {n}", "positive": f"{shared} number {n}"} for n in range(2)]
    pairs += [{"query": f"q {w}", "positive": f"{w} alone with {w} and {w}2"} for w in words[200:]]
    train, held_out = text.split_pairs(pairs, num_held_out=30, seed=3)
    assert len(held_out) == 30
    assert len(train) + len(held_out) == len(pairs)
    sides = {row["positive"].rsplit(" number", 1)[0] for row in held_out if " number" in row["positive"]}
    assert not any(row["positive"].rsplit(" number", 1)[0] in sides for row in train)
    assert text.split_pairs(pairs, num_held_out=30, seed=3) == (train, held_out)
    assert text.split_pairs(pairs, num_held_out=30, seed=4)[1] != held_out
    assert len(text.split_pairs(pairs, num_held_out=30, num_train=50)[0]) == 50
    with pytest.raises(DataError, match="too few"):
        text.split_pairs(pairs[:5], num_held_out=5)


def test_the_pairs_of_this_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading all of torch takes a while; the two others have pairs enough for a test.
    monkeypatch.setattr(text, "_roots", lambda: ROOTS[:2])
    files = text.write_pairs(tmp_path / "pairs")
    train, queries, corpus = rows_of(files.train), rows_of(files.queries), rows_of(files.corpus)
    assert len(queries) == 500
    assert len(train) >= 1500
    assert {row["positive"] for row in train} < {row["text"] for row in corpus}
    assert len(corpus) == len(train) + len(queries)
    low, high = text.QUERY_LENGTH
    assert all(low <= len(row["query"]) <= high for row in train)
    assert len({row["text"] for row in corpus}) == len(corpus)
    assert not {row["query"] for row in train} & {row["text"] for row in queries}
    task = task_from_files(files.queries, files.corpus, files.qrels)
    assert all(len(relevant) == 1 for relevant in task.relevant)
    trained = {row["positive"] for row in train}
    answers = [task.corpus[next(iter(relevant))].text for relevant in task.relevant]
    assert not trained & set(answers)


# Images


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    images.write_digits(folder)
    images.write_model_folder(folder / "model")
    return folder


def test_digits_are_held_out_by_class(digits: Path) -> None:
    train, held_out = rows_of(digits / "train.jsonl"), rows_of(digits / "held_out.jsonl")
    assert (len(train), len(held_out)) == (5 * 1437, 360)
    digit_of = [{row["positive_image"].split("-")[0] for row in rows} for rows in (train, held_out)]
    assert [len(digits) for digits in digit_of] == [1437, 360]
    assert not digit_of[0] & digit_of[1]
    assert len({row["positive_image"] for row in train}) == len(train)
    assert set(Counter(row["label"] for row in held_out).values()) <= {35, 36, 37}
    for row in train + held_out:
        assert row["query"] in {images.caption(int(row["label"]), t) for t in images.TEMPLATES}
    # Every class is described in every way.
    assert len({row["query"] for row in train}) == 10 * len(images.TEMPLATES)
    image = Image.open(digits / "images/0001-0.png")
    assert (image.mode, image.size) == ("L", (8, 8))
    assert (np.asarray(image).min(), np.asarray(image).max()) == (0, 255)


def test_training_digits_are_also_moved_by_a_pixel(digits: Path) -> None:
    row = rows_of(digits / "train.jsonl")[0]["positive_image"]
    still, down, up, right, left = (np.asarray(Image.open(digits / row.replace("-0", f"-{n}"))) for n in range(5))
    assert np.array_equal(down[1:], still[:-1])
    assert np.array_equal(up[:-1], still[1:])
    assert np.array_equal(right[:, 1:], still[:, :-1])
    assert np.array_equal(left[:, :-1], still[:, 1:])


def test_writing_the_digits_again_gives_the_same(digits: Path, tmp_path: Path) -> None:
    images.write_digits(tmp_path)
    images.write_model_folder(tmp_path / "model")
    for file in (
        "train.jsonl",
        "held_out.jsonl",
        "images/0007-0.png",
        "model/model.safetensors",
        "model/tokenizer.json",
    ):
        assert (tmp_path / file).read_bytes() == (digits / file).read_bytes()


def test_transformers_loads_the_model_folder(digits: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = digits / "model"
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    captions = ["A handwritten three", "the number 3", "a photo of the digit seven"]
    encoded = tokenizer(captions, padding=True, return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}
    ids = encoded["input_ids"]
    config = model.config.text_config
    assert config.eos_token_id == tokenizer.eos_token_id != 2
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert (ids == config.eos_token_id).sum(1).tolist() == [1, 1, 1]
    assert tokenizer.unk_token_id not in ids
    pixels = processor([Image.open(digits / "images/0000-0.png")], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, images.IMAGE_SIZE, images.IMAGE_SIZE)
    with torch.no_grad():
        texts = model.get_text_features(**encoded)
        alone = model.get_text_features(**tokenizer(captions[:1], return_tensors="pt"))
        assert model.get_image_features(pixels).shape == (1, model.config.projection_dim)
    torch.testing.assert_close(texts[:1], alone)


class LabelEmbedder:
    """Knows the class of every digit; the last ``wrong`` images are taken for the next class."""

    def __init__(self, folder: Path, wrong: int = 0) -> None:
        rows = rows_of(folder / "held_out.jsonl")
        self._digit = {folder / row["positive_image"]: int(row["label"]) for row in rows}
        for file in list(self._digit)[len(self._digit) - wrong :]:
            self._digit[file] = (self._digit[file] + 1) % 10
        for template in images.TEMPLATES:
            self._digit |= {images.caption(d, template): d for d in range(10)}  # type: ignore[misc]

    def encode_document(self, inputs: list[Item], *, batch_size: int | None = None) -> Any:
        keys = [item.images[0] if item.images else item.text for item in inputs]
        return np.eye(10, dtype=np.float32)[[self._digit[key] for key in keys]]  # type: ignore[index]

    encode_query = encode_document


def test_what_the_image_demo_measures(digits: Path) -> None:
    perfect = images.evaluate_digits(LabelEmbedder(digits), digits)
    assert set(perfect.values()) == {1.0}
    results = images.evaluate_digits(LabelEmbedder(digits, wrong=36), digits)
    assert results["zero_shot_accuracy"] == pytest.approx(0.9)
    assert results["i2t/hit@1"] == pytest.approx(0.9)
    assert results["i2i_recall@1"] == pytest.approx(0.9)


def test_importing_the_demos_is_light() -> None:
    heavy = "torch", "numpy", "sklearn", "PIL", "transformers"
    code = f"import sys, vembed_fs2.demo.text, vembed_fs2.demo.images; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_table_of_the_first_guide_has_hard_negatives_of_other_rows(tmp_path: Path) -> None:
    files = table.write_table(tmp_path, num_train=60, num_valid=20)

    rows = {file: list(csv.DictReader(file.open(newline="", encoding="utf-8"))) for file in files}
    assert [len(rows[file]) for file in files] == [60, 20]
    for part in rows.values():
        answers = {row["positive"] for row in part}
        for row in part:
            negatives = {row["negative_1"], row["negative_2"]}
            assert len(negatives) == 2
            assert negatives <= answers - {row["positive"]}

    written = files.train.read_bytes()
    with pytest.raises(VembedError, match=r"'.*train\.csv' exists"):
        table.write_table(tmp_path)
    assert files.train.read_bytes() == written


def test_hard_negatives_share_words_with_the_query() -> None:
    pairs = [
        {"query": "sort a list by a key", "positive": "list.sort takes a key function"},
        {"query": "close a file", "positive": "file.close flushes what was written"},
        {"query": "order of a list", "positive": "a list keeps the order in which items came"},
        {"query": "sum of an array", "positive": "adds all elements of the array"},
    ]
    rows = table.build_table(pairs)
    assert rows[0]["negative_1"] == pairs[2]["positive"]

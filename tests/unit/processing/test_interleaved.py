"""Inputs of texts and images in an order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from vembed_fs2.data.example import Example, Image, Item, Text
from vembed_fs2.data.schema import RowSchema, content_id, kind_of
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.errors import DataError
from vembed_fs2.processing.processor import as_item
from vembed_fs2.processing.towers import TowerProcessor
from vembed_fs2.recipes.train.dataset import Collator


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> TowerProcessor:
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(folder)
    return TowerProcessor.load(folder, frozenset({"text", "image"}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        PILImage.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path.resolve()


def parse(query: object, root: Path, **row: object) -> Example:
    return RowSchema().parse({"query": query, "positive": "p", **row}, "f.jsonl:7", root)


def test_a_row_keeps_the_order_of_its_texts_and_images(root: Path) -> None:
    query = [{"text": "this"}, {"image": "a.png"}, {"text": "but"}, {"image": ["a.png", "b.png"]}]
    a, b = Image(root / "a.png"), Image(root / "b.png")
    item = parse(query, root, instruction="Find it.").query
    assert item.parts == (Text("this"), a, Text("but"), a, b)
    assert item.instruction == "Find it."
    assert item.is_interleaved
    assert item.describe_order() == "text, image, text, image, image"
    assert (item.text, item.images) == ("this\nbut", (root / "a.png", root / "a.png", root / "b.png"))
    assert kind_of(item) == "m"


def test_columnar_files_write_missing_keys_as_null(root: Path) -> None:
    query = [{"text": "this", "image": None}, {"text": None, "image": "a.png"}]
    assert parse(query, root).query.parts == (Text("this"), Image(root / "a.png"))


def test_negatives_and_positives_may_be_interleaved(root: Path) -> None:
    parts = [{"text": "x"}, {"image": "a.png"}]
    example = parse("q", root, positive=parts, negatives=[parts, "n"], negative_1=parts)
    expected = Item(parts=[Text("x"), Image(root / "a.png")])
    assert example.items == (Item("q"), expected, expected, Item("n"), expected)


def test_images_come_before_the_text_if_the_row_does_not_order_them(root: Path) -> None:
    item = parse({"text": "t", "image": "a.png"}, root).query
    assert item == Item("t", (root / "a.png",)) == parse("t", root, query_image="a.png").query
    assert item.parts == (Image(root / "a.png"), Text("t"))
    assert not item.is_interleaved


@pytest.mark.parametrize(
    ("query", "row", "message"),
    [
        ([{"text": "a"}, 3], {}, r"'query\[1\]' must be a text, or an object .* but is 3"),
        ([{"text": "a"}, {"txt": "b"}], {}, r"'query\[1\]' has the key 'txt'; known are text, image"),
        ([{"text": "a"}, {}], {}, r"'query\[1\]' must hold either a text or an image, but holds neither"),
        ([{"text": "a", "image": "a.png"}, {"text": "b"}], {}, r"'query\[0\]' .* but holds text and image"),
        ([{"text": "a"}, {"text": ""}], {}, r"'query\[1\]' is an empty text"),
        ([{"text": "a"}, {"image": "c.png"}], {}, r"'query\[1\]' is c.png, but there is no file"),
        ([{"text": "a"}, {"text": "b"}], {"query_image": "a.png"}, "'query_image' must not be given when 'query' is"),
    ],
)
def test_wrong_parts_name_row_key_and_entry(root: Path, query: object, row: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"^f.jsonl:7: {message}"):
        parse(query, root, **row)


def test_one_sentence_refuses_an_order() -> None:
    item = Item(parts=[Text("a"), Image(b"x"), Text("b")])
    assert item.order_error("the teacher") == (
        "the teacher encodes texts and images apart, so it cannot read them in the order text, image, text."
        " Give one text, before or after the images."
    )
    texts = Item(parts=[Text("a"), Text("b")])
    assert texts.order_error("The model") == "The model reads one text per input, but an input has 2."


def test_the_order_tells_rows_apart() -> None:
    one, other = [Text("a"), Text("b")], [Text("b"), Text("a")]
    assert content_id(Item(parts=one)) != content_id(Item(parts=other))
    assert content_id(Item(parts=one)) != content_id(Item("a\nb"))
    assert content_id(Item("a", (b"x",))) == content_id(Item(parts=[Image(b"x"), Text("a")]))


def test_inputs_are_lists_of_texts_and_images(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    item = as_item(["see", file, {"text": "and"}, {"image": [str(file), b"png"]}, Text("end")])
    assert item.parts == (Text("see"), Image(file), Text("and"), Image(file), Image(b"png"), Text("end"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "neither a text nor an image"),
        (["a", ["b"]], "a list within a list"),
        (["a", {"text": "b", "image": b"x"}], "must be one text or image"),
        (["a", {"text": "b", "instruction": "i"}], "must be one text or image"),
        (["a", 3], "is of type `int`"),
    ],
)
def test_wrong_lists_are_errors(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_item(value)


def test_an_item_is_made_of_parts_or_of_a_text_and_images() -> None:
    with pytest.raises(ValueError, match="`parts` must not be given together"):
        Item("a", parts=[Text("b")])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([Text("a"), Image(b"x"), Text("b")], r"texts and images apart, .* the order text, image, text\."),
        ([Text("a"), Text("b")], "one text per input, but an input has 2"),
    ],
)
def test_towers_refuse_an_order_that_they_cannot_express(
    processor: TowerProcessor, parts: list[Any], message: str
) -> None:
    item = Item(parts=parts, source="rows.parquet:row 3")
    with pytest.raises(DataError, match=f"^rows.parquet:row 3: .*{message}"):
        processor.prepare(item)

    example = Example(Item("q"), Item(parts=parts), source="data.jsonl:7")
    with pytest.raises(DataError, match=f"^data.jsonl:7: .*{message}"):
        Collator(processor).load(example)


def test_models_of_several_vectors_take_one_part(processor: TowerProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "takes_one_part", True)
    with pytest.raises(DataError, match=r"^f:1: .* one text or one image, but is image, text\."):
        processor.prepare(Item("a", (b"x",), source="f:1"))


def test_strings_may_stand_among_objects(root: Path) -> None:
    assert parse(["this", {"image": "a.png"}], root).query.parts == (Text("this"), Image(root / "a.png"))
    assert as_item([{"text": "a", "image": "b.png"}]) == as_item({"text": "a", "image": "b.png"})


def test_files_of_strings_hold_the_list_as_json(root: Path) -> None:
    def read(query: str) -> Item:
        return RowSchema().parse({"query": query, "positive": "p"}, "f.csv:2", root, untyped=True).query

    assert read('[{"text": "this"}, {"image": "a.png"}]').parts == (Text("this"), Image(root / "a.png"))
    for text in ("[1, 2]", '[{"text": "open', '[{"colour": "red"}]', "[{x}]"):
        assert read(text) == Item(text)
    with pytest.raises(DataError, match=r"^f.csv:2: 'query\[1\]' is c.png, but there is no file"):
        read('[{"text": "this"}, {"image": "c.png"}]')


def test_towers_read_a_text_before_or_after_images(processor: TowerProcessor) -> None:
    image = PILImage.new("RGB", (20, 16))
    before, after = [Text("three"), Image(image)], [Image(image), Text("three")]
    batch = processor([Item(parts=before), Item(parts=after)])
    assert batch.text is not None
    assert batch.text.input_ids[0].tolist() == batch.text.input_ids[1].tolist()
    assert batch.profile().kinds == [3, 3]


def test_the_role_chooses_the_prompt(processor: TowerProcessor) -> None:
    def ids(**kwargs: Any) -> list[int]:
        text = processor([Item("three")], **kwargs).text
        assert text is not None
        return text.input_ids[0].tolist()  # type: ignore[no-any-return]

    processor.settings.prompts = {"query": "one ", "document": "two "}
    expected = {name: processor([Item(f"{name} three")], prompt="").text for name in ("one", "two")}
    assert ids(role="query") == expected["one"].input_ids[0].tolist()  # type: ignore[union-attr]
    assert ids(role="document") == expected["two"].input_ids[0].tolist()  # type: ignore[union-attr]
    assert ids(role="query", prompt="two ") == ids(role="document")
    assert ids() == ids(prompt="") == ids(role="query", prompt="")

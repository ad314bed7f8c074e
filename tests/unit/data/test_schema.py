"""Rows as examples: fields, modes, images, strictness, hashes."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vembed_fs2.data.example import Example, Item
from vembed_fs2.data.schema import FIELDS, RowSchema, content_id, label_id
from vembed_fs2.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (4, 3)).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def parse(row: dict[str, Any], root: Path = Path("."), *, untyped: bool = False, **options: Any) -> Example:
    return RowSchema(**options).parse(row, "f.jsonl:7", root, untyped=untyped)


def texts(items: tuple[Item, ...]) -> list[str | None]:
    return [item.text for item in items]


def test_all_fields(root: Path) -> None:
    example = parse(
        {
            "query": "q",
            "query_image": ["images/a.png", "images/b.png"],
            "positive": ["p"],
            "negatives": ["n", {"text": "m", "image": "images/a.png", "instruction": "own"}],
            "label": 3,
            "scores": [1, 0.5, 0],
            "instruction": "find",
            "document_instruction": "keep",
        },
        root,
    )
    a, b = (root.resolve() / "images" / f"{n}.png" for n in "ab")
    assert example == Example(
        Item("q", (a, b), "find"),
        Item("p", (), "keep"),
        (Item("n", (), "keep"), Item("m", (a,), "own")),
        "3",
        (1.0, 0.5, 0.0),
    )
    assert example.source == "f.jsonl:7"


@pytest.mark.parametrize("query", FIELDS["query"])
@pytest.mark.parametrize("positive", FIELDS["positive"])
@pytest.mark.parametrize("negative", FIELDS["negatives"])
def test_aliases(query: str, positive: str, negative: str) -> None:
    expected = Example(Item("q"), Item("p"), (Item("n"),))
    assert parse({query: "q", positive: "p", negative: "n"}) == expected


def test_numbered_negatives_keep_their_order_and_their_images(root: Path) -> None:
    row = {"query": "q", "positive": "p", "negative_10": "z", "negative_2": "b", "negative_image_2": "images/a.png"}
    row |= {"negative_1": "a", "negative_3": None}
    example = parse(row, root)
    assert texts(example.negatives) == ["a", "b", "z"]
    assert [len(n.images) for n in example.negatives] == [0, 1, 0]


def test_image_negatives(root: Path) -> None:
    row = {"query": "q", "positive_image": "images/a.png", "negative_images": ["images/a.png", ["images/b.png"] * 2]}
    example = parse(row, root, mode="t2i")
    assert [len(n.images) for n in example.negatives] == [1, 2]


def test_images_as_bytes(root: Path) -> None:
    row = {"query_image": {"bytes": b"png", "path": "elsewhere.png"}, "positive_image": b"raw"}
    example = parse(row | {"negative_images": [{"bytes": None, "path": "images/a.png"}]}, root, mode="i2i")
    assert example.query.images == (b"png",)
    assert example.positive == Item(None, (b"raw",))
    assert example.negatives[0].images == (root.resolve() / "images/a.png",)


def test_a_text_with_a_slash_is_a_text() -> None:
    example = parse({"query": "a/b.png", "positive": "/pictures/x.jpg", "negatives": ["http://x/y.png"]}, mode="t2t")
    assert (example.query, example.positive) == (Item("a/b.png"), Item("/pictures/x.jpg"))


def test_columns(root: Path) -> None:
    row = {"positive": "q", "query": "p", "hard": ["n"], "negative_1": "left out"}
    columns = {"query": "positive", "positive": "query", "negatives": "hard"}
    assert parse(row, columns=columns) == Example(Item("q"), Item("p"), (Item("n"),))
    assert parse(row, columns={**columns, "negatives": None}).negatives == ()


def test_columns_of_several_negatives(root: Path) -> None:
    row = {"query": "q", "positive": "p", "hard 1": "a", "hard 2": "b", "view": "images/a.png", "negative_9": "out"}
    for columns in (
        {"negative_2": "hard 2", "negative_1": "hard 1", "negative_image_1": "view"},
        {"negatives": ["hard 1", "hard 2"], "negative_images": ["view"]},
    ):
        negatives = parse(row, root, columns={**columns, "negative_9": None}).negatives
        assert texts(negatives) == ["a", "b"]
        assert [len(n.images) for n in negatives] == [1, 0]


def test_wrong_columns_are_errors() -> None:
    with pytest.raises(ConfigError) as caught:
        RowSchema(columns={"negativ_1": "a", "query": ["a", "b"], "negative_1": ["c", "d"]})
    assert "maps 'negativ_1', which is not a field" in str(caught.value)
    assert "maps 'query' to several columns" in str(caught.value)
    assert "maps 'negative_1' to several columns" in str(caught.value)
    with pytest.raises(DataError, match="has no column 'hard', which `columns` maps to 'negative_1'"):
        parse({"query": "q", "positive": "p"}, columns={"negatives": ["hard"]})


def test_untyped_rows(root: Path) -> None:
    row = {"query": "[1, 2]", "positive": "", "positive_image": '["images/a.png"]', "negative": "n", "label": ""}
    row |= {"scores": "[1, 0.5]", "instruction": ""}
    example = parse(row, root, untyped=True)
    assert example.query.text == "[1, 2]"
    assert example.positive == Item(None, (root.resolve() / "images/a.png",))
    assert (texts(example.negatives), example.label, example.scores) == (["n"], None, (1.0, 0.5))
    assert parse({"query": "q", "positive": "p", "score": "0.5"}, untyped=True).scores == (0.5,)


@pytest.mark.parametrize(
    ("label", "read"),
    [
        ("cat", "cat"),
        (3, "3"),
        (3.0, "3"),
        ("3", "3"),
        (Decimal("3.00"), "3"),
        ("03", "03"),
        ("3.0", "3.0"),  # A string in a file that tells strings from numbers.
        (True, "True"),
    ],
)
def test_labels(label: object, read: str) -> None:
    assert parse({"query": "q", "label": label}).label == read


@pytest.mark.parametrize(
    ("label", "read"),
    [
        ("1", "1"),
        ("1.0", "1"),
        ("0.0", "0"),
        ("-7.0", "-7"),
        ("12.00", "12"),
        ("01", "01"),
        ("01.0", "01.0"),
        ("1.5", "1.5"),
        ("1.0.0", "1.0.0"),
        ("True", "True"),
    ],
)
def test_integers_that_a_table_wrote_as_floats_are_the_same_labels(label: str, read: str) -> None:
    assert parse({"query": "q", "label": label}, untyped=True).label == read


def test_a_gap_of_a_column_of_floats_is_no_label() -> None:
    assert parse({**PAIR, "label": math.nan}).label is None


@pytest.mark.parametrize(
    ("mode", "query", "positive"),
    [(mode, mode[0], mode[2]) for mode in ("t2t", "t2i", "i2i", "i2t", "m2i", "m2t")],
)
def test_a_mode_accepts_its_rows_and_no_others(root: Path, mode: str, query: str, positive: str) -> None:
    values = {"t": {"": "x"}, "i": {"_image": "images/a.png"}, "m": {"": "x", "_image": "images/a.png"}}
    for q in "tim":
        for p in "tim":
            row = {"query" + k: v for k, v in values[q].items()} | {"positive" + k: v for k, v in values[p].items()}
            if (q, p) == (query, positive):
                parse(row, root, mode=mode)
                continue
            with pytest.raises(DataError, match=rf"f.jsonl:7: '(query|positive)' must be an?.* in mode {mode}, but is"):
                parse(row, root, mode=mode)


def test_a_mode_checks_negatives(root: Path) -> None:
    row = {"query": "q", "positive_image": "images/a.png", "negatives": ["text"]}
    with pytest.raises(DataError, match="'negatives' must be an image and no text in mode t2i, but is a text"):
        parse(row, root, mode="t2i")


PAIR = {"query": "q", "positive": "p"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "", "positive": "p"}, "'query' is an empty text"),
        ({"query": " \n", "positive": "p"}, "'query' is an empty text"),
        ({"query": None, "positive": "p"}, "'query' is empty, and there is no image either"),
        ({"query": 5, "positive": "p"}, "'query' must be a text, but is 5"),
        ({"query": "\ud800", "positive": "p"}, "'query' has half of a surrogate pair"),
        ({"text": "q", "positive": "p"}, "has no query. Its columns are 'text', 'positive'"),
        ({"query": "q"}, "has no positive and no label"),
        ({"query": "q", "positive": None}, "'positive' is empty, and there is no image and no label either"),
        ({"query": ["q", "r"], "positive": "p"}, "'query' must be one value, but is a list of 2; write one row"),
        ({"query": "q", "positive": ["a", "b"]}, "the row has 2 positives, but one is expected here"),
        ({"query": "q", "positive": []}, "'positive' is an empty list"),
        ({"query": "q", "positive": {"text": "p", "img": "x"}}, "'positive' has the key 'img'; known are text, image"),
        ({**PAIR, "negatives": ["a", ""]}, "'negatives' is an empty text"),
        ({**PAIR, "negatives": ["a", None]}, "'negatives' has nothing as entry 2"),
        ({**PAIR, "negatives": ["a"], "negative_images": []}, None),
        ({**PAIR, "negatives": ["a", "b"], "negative_images": ["c"]}, "'negative_images' has 1 entries, but"),
        ({**PAIR, "neg_1": "a", "negative_1": "b"}, "'negative_1' means the same as 'neg_1'"),
        ({**PAIR, "anchor": "a"}, "'anchor' means the same as 'query'"),
        ({**PAIR, "negtives": ["a"]}, "'negtives' is no field. Did you mean 'negatives'"),
        ({**PAIR, "query_id": 1, "positive_id": 2, "title": 3}, None),
        ({**PAIR, "label": ["a"]}, "'label' must be a string, an integer or a boolean, but is of type list"),
        ({**PAIR, "label": 1.5}, "'label' must be a string, an integer or a boolean, but is 1.5"),
        ({**PAIR, "label": ""}, "'label' is an empty text"),
        ({**PAIR, "scores": [1, 2]}, "'scores' must have 1 entries"),
        ({**PAIR, "score": "1"}, "'score' must hold finite numbers, but holds '1'"),
        ({**PAIR, "score": float("nan")}, "'score' must hold finite numbers, but holds nan"),
        ({**PAIR, "score": 10**400}, "'score' must hold finite numbers"),
        ({"query": "q", "label": "l", "score": 1.0}, "'score' scores the positive, but the row has none"),
        ({**PAIR, "instruction": 5}, "'instruction' must be a text, but is 5"),
        ({**PAIR, "query_image": ""}, "'query_image' must be the path of an image"),
        ({**PAIR, "query_image": ["images/a.png", None]}, "'query_image' must be the path of an image.*but is None"),
        ({**PAIR, "query_image": [{"bytes": None, "path": None}]}, "'query_image' must be the path.*but is None"),
        ({**PAIR, "query_image": {"bytes": b"", "path": ""}}, "'query_image' must be the path.*but is empty"),
        ({**PAIR, "query_image": "images/c.png"}, "'query_image' is images/c.png, but there is no file"),
        ({**PAIR, "query_image": "images"}, "'query_image' is images, but there is no file"),
        ({**PAIR, "query_image": "../x.png"}, "'query_image' is ../x.png, which lies outside of the image folder"),
        ({**PAIR, "query_image": "/etc/passwd"}, "lies outside of the image folder"),
        ({**PAIR, "query_image": "link.png"}, "lies outside of the image folder"),
        ({**PAIR, "query_image": "a\0.png"}, "'query_image' is not a path"),
        ({**PAIR, "query_image": "https://x/a.png"}, "'query_image' is the URL .* allow_urls=true"),
        ({"query": {"text": "q", "image": "images/a.png"}, "query_image": "images/b.png", "positive": "p"}, "itself"),
    ],
)
def test_broken_rows(root: Path, row: dict[str, Any], message: str | None) -> None:
    (root / "link.png").symlink_to("/etc/passwd")
    if message is None:
        parse(row, root)
        return
    with pytest.raises(DataError, match="^f.jsonl:7: .*" + message):
        parse(row, root)


def test_symlinks_inside_of_the_root_are_followed(root: Path) -> None:
    (root / "link.png").symlink_to("images/a.png")
    absolute = str(root / "images" / "a.png")
    example = parse({"query_image": "link.png", "positive_image": absolute}, root)
    assert example.positive is not None
    assert example.query.images == example.positive.images


def test_image_root(root: Path) -> None:
    row = {"query_image": "a.png", "positive": "p"}
    assert parse(row, Path("/nowhere"), image_root=root / "images").query.images
    with pytest.raises(ConfigError, match="`image_root` must be a folder"):
        RowSchema(image_root=root / "none")


def test_urls() -> None:
    row = {"query_image": "HTTPS://x/a.png", "positive": "p"}
    assert parse(row, allow_urls=True).query.images == ("HTTPS://x/a.png",)
    with pytest.raises(DataError, match="only HTTP and HTTPS"):
        parse({"query_image": "ftp://x/a.png", "positive": "p"}, allow_urls=True)


def test_configuration_errors_come_together_and_name_the_nearest() -> None:
    with pytest.raises(ConfigError) as info:
        RowSchema(mode="t2x", columns={"querry": "q"})
    assert len(info.value.errors) == 2
    assert "Did you mean 't2" in info.value.errors[0]
    assert "Did you mean 'query'?" in info.value.errors[1]
    with pytest.raises(
        DataError, match=r"has no column .titel., which `columns` maps to 'query'\. Did you mean .title."
    ):
        parse({"title": "q", "positive": "p"}, columns={"query": "titel"})


def test_content_id() -> None:
    items = [
        Item("ab"),
        Item("a", instruction="b"),
        Item("a"),
        Item(None, (b"a",)),
        Item(None, (Path("a"),)),
        Item("a", (b"a",)),
        Item(None, (b"a", b"b")),
        Item(None, (b"ab",)),
        Item(None, (Image.new("RGB", (2, 1)),)),
        Item(None, (Image.new("RGB", (1, 2)),)),
    ]
    ids = [content_id(item) for item in items]
    assert len(set(ids)) == len(items)
    assert ids == [content_id(item) for item in items]
    assert all(0 <= i < 2**63 for i in ids)
    assert content_id(Item("a")) == 3806494244849715603
    assert label_id(3) == label_id("3") != label_id("4")

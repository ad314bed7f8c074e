"""Rows that are given as objects are read from their file as the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.decode import decode_image
from vembed_fs2.data.example import Example
from vembed_fs2.data.given import as_paths, write_rows
from vembed_fs2.errors import DataError

PAIRS = [{"query": f"q{i}", "positive": f"d{i}", "label": i, "negatives": [f"n{i}", "n"]} for i in range(3)]

RED, BLUE = Image.new("RGB", (4, 2), "red"), Image.new("RGB", (3, 3), "blue")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(folder: Path, rows: object, **options: Any) -> list[Example]:
    return list(ExampleDataset(write_rows(rows, folder, "train", **options), columns=options.get("columns")))


def pixels(example: Example) -> list[list[tuple[int, ...]]]:
    """The colors of the images of a row, by item."""
    images = [[decode_image(image) for image in item.images] for item in example.items]
    return [[image.getpixel((0, 0)) for image in row] for row in images]  # type: ignore[misc]


def generated() -> Iterator[dict[str, Any]]:
    yield from PAIRS


@pytest.mark.parametrize(
    ("rows", "suffix"),
    [
        (PAIRS, ".jsonl"),
        (tuple(PAIRS), ".jsonl"),
        (generated, ".jsonl"),
        (pd.DataFrame(PAIRS), ".parquet"),
        (pa.Table.from_pylist(PAIRS), ".parquet"),
        (pa.Table.from_pylist(PAIRS).to_batches()[0], ".parquet"),
        (datasets.Dataset.from_list(PAIRS), ".parquet"),
        (datasets.Dataset.from_list([*PAIRS, *PAIRS]).select(range(3)), ".parquet"),
        (datasets.Dataset.from_list(PAIRS).to_iterable_dataset(), ".jsonl"),
    ],
)
def test_rows_of_any_kind_are_read_as_the_same(rows: Any, suffix: str, tmp_path: Path) -> None:
    file = write_rows(rows() if callable(rows) else rows, tmp_path, "train")

    assert file.name == f"train{suffix}"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    examples = list(ExampleDataset(file))
    assert [(e.query.text, e.positive and e.positive.text, e.label) for e in examples] == [
        ("q0", "d0", "0"), ("q1", "d1", "1"), ("q2", "d2", "2")
    ]  # fmt: skip
    assert [item.text for item in examples[1].negatives] == ["n1", "n"]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "a", "positive_image": RED},
        {"query": "a", "positive_image": encoded(RED)},
        {"query": "a", "positive_image": {"bytes": encoded(RED), "path": "gone.png"}},
        {"query": "a", "positive_image": {"bytes": None, "path": "red.png"}},
        {"query": "a", "positive_image": "red.png"},
        {"query": "a", "positive_image": "sub/../red.png"},
        {"query": "a", "positive_image": ["red.png"]},
        {"query": "a", "positive": RED},
        {"query": "a", "positive": {"image": RED}},
        {"query": "a", "positive": {"image": ["red.png"]}},
        {"query": "a", "positive": Path("red.png")},
    ],
)
def test_an_image_is_a_file_beside_the_rows(
    row: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("red.png").write_bytes(encoded(RED))
    monkeypatch.chdir(tmp_path)

    (example,) = read(tmp_path / "rows", [row])

    assert pixels(example) == [[], [(255, 0, 0)]]
    assert len(list(tmp_path.joinpath("rows", "images").iterdir())) == 1


def test_parts_negatives_and_columns_of_images(tmp_path: Path) -> None:
    rows = [
        {"pic": BLUE, "positive": [{"text": "x"}, {"image": RED}, {"text": "y"}], "negative_image_1": RED},
        {"pic": RED, "positive": "as a text", "negative_images": [BLUE, RED], "time": date(2026, 1, 2)},
    ]  # fmt: skip

    first, second = read(tmp_path, rows, columns={"query_image": "pic"})

    red, blue = (255, 0, 0), (0, 0, 255)
    assert pixels(first) == [[blue], [red], [red]]
    assert first.positive is not None
    assert first.positive.describe_order() == "text, image, text"
    assert pixels(second) == [[red], [], [blue], [red]]
    assert len(list((tmp_path / "images").iterdir())) == 2  # However many rows have them.


def test_an_image_is_kept_exactly(tmp_path: Path) -> None:
    """The bytes of a file as they are; an open image upright, without loss."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = encoded(noise, "JPEG", exif=exif)
    turned = Image.open(BytesIO(jpeg))

    of_bytes, of_image, of_cmyk = read(
        tmp_path, [{"query": "a", "positive_image": image} for image in (jpeg, turned, RED.convert("CMYK"))]
    )

    images = [decode_image(e.positive.images[0]) for e in (of_bytes, of_image, of_cmyk) if e.positive]
    assert [image.size for image in images] == [(5, 7), (5, 7), (4, 2)]
    assert images[0].tobytes() == images[1].tobytes()
    assert images[2].getpixel((0, 0)) == (255, 0, 0)
    assert of_bytes.positive is not None
    assert Path(str(of_bytes.positive.images[0])).read_bytes() == jpeg


def test_images_of_datasets_stay_bytes_in_parquet(tmp_path: Path) -> None:
    features = datasets.Features({"query": datasets.Value("string"), "positive_image": datasets.Image()})
    data = datasets.Dataset.from_dict({"query": ["a", "b"], "positive_image": [RED, BLUE]}, features=features)

    file = write_rows(data, tmp_path, "train")

    assert file.suffix == ".parquet"
    assert [pixels(e)[1] for e in ExampleDataset(file)] == [[(255, 0, 0)], [(0, 0, 255)]]
    assert pixels(read(tmp_path / "list", list(data))[0]) == [[], [(255, 0, 0)]]


def test_images_of_a_table_by_their_paths_are_copied(tmp_path: Path) -> None:
    tmp_path.joinpath("red.png").write_bytes(encoded(RED))
    frame = pd.DataFrame({"query": ["a", "b"], "positive_image": ["red.png", "red.png"], "negative_1": ["n", None]})

    first, second = read(tmp_path / "rows", frame, image_root=tmp_path)

    assert pixels(first) == [[], [(255, 0, 0)], []]
    assert len(second.negatives) == 0
    of_images = pd.DataFrame({"query": ["a"], "positive_image": [BLUE], "negative_1": [None]})
    assert pixels(read(tmp_path / "open", of_images)[0]) == [[], [(0, 0, 255)]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"The data has no rows\."),
        (pd.DataFrame({"query": []}), r"The data has no rows\."),
        (3, "must be files, an iterable of dicts, or a table of .* but is of type `int`"),
        (b"abc", "but is of type `bytes`"),
        ({"query": ["a"]}, "but is a dict of 'query'. Give one of its values, or rows"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)}), "but is a dict of 'train'"),
        ([PAIRS[0], "text"], "Row 2 must be a dict, but is of type `str`"),
        (pd.Series(["a"]), "Row 1 must be a dict, but is of type `str`"),
        ([{"query": "a", "positive": date(2026, 1, 2)}], "Row 1: a value of type `date` cannot be part of a row"),
        ([{"query": "a", "positive_image": "nosuch.png"}], r"Row 1: there is no file .*/nosuch\.png"),
        (
            [{"query": "a", "positive_image": "/etc/hostname"}],
            "lies outside of the folder .*; set `dataset.image_root`",
        ),
        ([{"query": "a", "positive_image": "../x.png"}], "Row 1: the image ../x.png lies outside of the folder"),
    ],
)
def test_what_cannot_be_rows_is_refused(rows: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write_rows(rows, tmp_path / "rows", "train")
    assert not list(tmp_path.rglob("train.*"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_row_whose_image_is_missing_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"query": "a", "positive_image": image} for image in (RED, "nosuch.png", "../x.png", "nul\0.png", "")]
    with pytest.raises(DataError, match="Row 2: there is no file"):
        write_rows(rows, tmp_path / "rows", "train")

    file = write_rows(rows, tmp_path / "rows", "train", on_error="skip")

    dataset = ExampleDataset(file, on_error="skip")
    assert (len(dataset), dataset.num_skipped) == (1, 4)


def test_a_misspelt_column_is_found_when_the_rows_are_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: 'negtives' is no field\. Did you mean 'negatives'\?"):
        read(tmp_path, [{"query": "a", "positive": "b", "negtives": ["c"]}])


@pytest.mark.parametrize("table", [False, True])
def test_the_same_rows_are_written_once(table: bool, tmp_path: Path) -> None:
    def rows(*texts: str) -> object:
        values = [{"query": text, "positive": text} for text in texts]
        return pa.Table.from_pylist(values) if table else values

    file = write_rows(rows("a", "b"), tmp_path, "train")
    before = file.stat().st_ino

    assert write_rows(rows("a", "b"), tmp_path, "train", replace=False) == file
    assert file.stat().st_ino == before
    with pytest.raises(DataError, match=rf"{file} holds other rows than these.* Give the same rows, or a new folder"):
        write_rows(rows("a", "c"), tmp_path, "train", replace=False)
    assert len(ExampleDataset(file)) == 2
    assert write_rows(rows("a", "b", "c"), tmp_path, "train") == file
    assert len(ExampleDataset(file)) == 3


def test_rows_of_another_kind_are_other_rows(tmp_path: Path) -> None:
    lines = write_rows(PAIRS, tmp_path, "train")
    with pytest.raises(DataError, match=f"{lines} holds other rows"):
        write_rows(pd.DataFrame(PAIRS), tmp_path, "train", replace=False)

    write_rows(pd.DataFrame(PAIRS), tmp_path, "train")

    assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]


def test_files_are_no_rows(tmp_path: Path) -> None:
    assert as_paths("a.jsonl") == as_paths(Path("a.jsonl")) == [Path("a.jsonl")]
    assert as_paths(["a", Path("b")]) == [Path("a"), Path("b")]
    assert as_paths([]) is None
    assert as_paths(PAIRS) is None
    assert json.loads(write_rows(PAIRS, tmp_path, "train").read_text().splitlines()[1]) == PAIRS[1]

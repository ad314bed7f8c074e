"""Folders of classes as data: images, or texts, whose label is the folder that they lie in."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from PIL import Image

from vembed_fs2.commands.data_check import check_dataset, render
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.schema import label_id
from vembed_fs2.errors import DataError


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(file)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Five images of three classes, one of them nested; and what is none."""
    for name in ("cat/2.png", "cat/1.JPG", "dog/puppy/a.webp", "dog/b.png", "dog/c.png"):
        picture(tmp_path / "train" / name)
    for name in (".cache/x.png", "cat/.hidden.png"):
        picture(tmp_path / "train" / name)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not a row")
    picture(tmp_path / "train" / "cover.png")
    return tmp_path / "train"


def test_images_are_rows_of_the_label_of_their_folder(train: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vembed_fs2"):
        dataset = ExampleDataset(train, mode="i2i")
    found = [(e.query.images[0], e.label, e.source) for e in dataset]
    names = [("cat/1.JPG", "cat"), ("cat/2.png", "cat"), ("dog/b.png", "dog"), ("dog/c.png", "dog")]
    names.append(("dog/puppy/a.webp", "dog/puppy"))
    assert found == [(train / name, label, str(train / name)) for name, label in names]
    assert all(e.positive is None and not e.query.text for e in dataset)
    assert dataset.labels().tolist() == [label_id(label) for _, label in names]
    assert (
        f"2 files lie beside the images of classes and are not read, such as {train / 'cat/notes.txt'}" in caplog.text
    )


def test_data_check_lists_other_files_and_says_what_can_be_trained(train: Path) -> None:
    report = check_dataset(train, images="all")
    assert report.ok
    assert report.modes == {"i with a label only": 5}
    assert report.other_files == [str(train / "cat/notes.txt"), str(train / "cover.png")]
    text = render(report)
    assert "other files:    2, not read: " in text
    assert "trains:         infonce, multi_positive, sigmoid, spread, triplet\n" in text
    assert "cosent, distillation, embedding_distillation (with a teacher): the row has no positive" in text


def test_a_broken_image_is_named(train: Path) -> None:
    (train / "cat" / "2.png").write_bytes(b"not an image")
    report = check_dataset(train, images="all")
    assert report.problems.count == 1
    assert str(train / "cat/2.png") in report.problems.first[0]


def test_texts_are_rows_where_there_are_no_images(tmp_path: Path) -> None:
    for name, text in (("sports/1.txt", "A goal.\n"), ("news/1.txt", "Über alles\n\nmehr"), ("news/2.md", "no row")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    dataset = ExampleDataset(tmp_path)
    assert [(e.query.text, e.label) for e in dataset] == [("Über alles\n\nmehr", "news"), ("A goal.", "sports")]
    (tmp_path / "news" / "1.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "sports" / "1.txt").write_text("  \n")
    assert [problem.removeprefix(str(tmp_path)) for problem in check_dataset(tmp_path).problems.first] == [
        "/news/1.txt: the text is not UTF-8.",
        "/sports/1.txt: 'query' is an empty text.",
    ]


def test_a_folder_of_shards_stays_one(train: Path) -> None:
    (train / "rows.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    assert [e.query.text for e in ExampleDataset(train)] == ["a"]


def test_several_folders_are_one_data_set(train: Path, tmp_path: Path) -> None:
    picture(tmp_path / "more" / "cat" / "9.png")
    dataset = ExampleDataset([train, tmp_path / "more"])
    assert [e.label for e in dataset] == ["cat", "cat", "dog", "dog", "dog/puppy", "cat"]
    (tmp_path / "x.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    with pytest.raises(DataError, match="All files must have the same format"):
        ExampleDataset([train, tmp_path / "x.jsonl"])


@pytest.mark.parametrize("name", ["empty/", "empty/cat/", "empty/1.png", "empty/.cat/1.png"])
def test_a_folder_without_classes_is_refused(name: str, tmp_path: Path) -> None:
    if name.endswith(".png"):
        picture(tmp_path / name)
    else:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty has no data files.*, and no folders of "):
        ExampleDataset(tmp_path / "empty")


def test_links(train: Path, tmp_path: Path) -> None:
    """A linked class is read; its images must lie in the image root, as all must. A circle has an end."""
    picture(tmp_path / "all" / "cow" / "1.png")
    (train / "cow").symlink_to(tmp_path / "all" / "cow")
    (train / "dog" / "again").symlink_to(train)
    with pytest.raises(
        DataError, match=r"cow/1\.png: 'query_image' is .* outside of the image folder .*set image_root"
    ):
        ExampleDataset(train)
    dataset = ExampleDataset(train, image_root=tmp_path)
    assert [e.label for e in dataset] == ["cat", "cat", "cow", "dog", "dog", "dog/puppy"]


def test_a_run_is_not_resumed_with_other_files(train: Path) -> None:
    before = ExampleDataset(train).fingerprints()
    assert ExampleDataset(train).fingerprints() == before
    (train / "cat" / "2.png").rename(train / "dog" / "2.png")
    assert ExampleDataset(train).fingerprints() != before

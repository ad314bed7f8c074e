"""Inputs of all kinds to batches."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vembed_fs2.data.example import Example, Item
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.processing.processor import ProcessorSettings, as_item
from vembed_fs2.processing.towers import TowerProcessor
from vembed_fs2.recipes.train.dataset import Collator

BOTH = frozenset({"text", "image"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(out)
    return out


@pytest.fixture
def processor(folder: Path) -> TowerProcessor:
    return TowerProcessor.load(folder, BOTH, tokens_per_image=5)


def image(color: int = 100) -> Image.Image:
    return Image.new("RGB", (20, 16), (color, 10, 200))


def test_rows_of_all_kinds_make_one_batch(processor: TowerProcessor) -> None:
    items = [
        Item(text="a three"),
        Item(images=(image(),)),
        Item(text="one", images=(image(), image(50))),
    ]
    batch = processor(items)
    assert batch.num_rows == 3
    assert batch.profile().kinds == [1, 2, 3]
    assert batch.profile().patches == [0, 5, 10]
    assert batch.text is not None
    assert batch.images is not None
    assert batch.text.rows.tolist() == [0, 2]
    assert batch.images.rows.tolist() == [1, 2, 2]
    assert processor([]).num_rows == 0


def test_prompts_go_before_texts_and_instructions_take_their_place(processor: TowerProcessor) -> None:
    def ids(batch: Any) -> list[list[int]]:
        return [row[mask].tolist() for row, mask in zip(batch.text.input_ids, batch.text.attention_mask)]

    items = [Item(text="three"), Item(text="three", instruction="the number"), Item(text="", instruction="one")]
    got = ids(processor(items, prompt="a "))
    texts = [Item(text=t) for t in ("a three", "the number three", "one ")]
    assert got == ids(processor(texts))
    processor.settings.instruction_template = "{instruction}: {instruction} "
    assert ids(processor(items[1:2], prompt="a ")) == ids(processor([Item(text="the number: the number three")]))


@pytest.mark.parametrize(
    ("prompts", "default", "expected"),
    [
        ({"query": "Q ", "document": "D "}, None, ("Q ", "D ", None)),
        ({"query": "Q ", "passage": "P "}, None, ("Q ", "P ", None)),
        ({"corpus": "C ", "passage": "P ", "document": ""}, "corpus", ("C ", "", "C ")),
        ({"other": "O "}, "other", ("O ", "O ", "O ")),
        ({}, None, (None, None, None)),
    ],
)
def test_the_prompts_of_roles_are_found_by_the_names_that_models_use(
    prompts: dict[str, str], default: str | None, expected: tuple[Any, ...]
) -> None:
    processor = TowerProcessor(None, None, ProcessorSettings(prompts=prompts, default_prompt_name=default))
    assert tuple(processor.prompt_for(role) for role in ("query", "document", None)) == expected


def test_inputs_are_converted(tmp_path: Path) -> None:
    png = io.BytesIO()
    image().save(png, "PNG")
    file = tmp_path / "i.png"
    file.write_bytes(png.getvalue())
    assert as_item("x/y.png") == Item(text="x/y.png")
    assert as_item(file) == Item(images=(file,))
    assert as_item(png.getvalue()) == Item(images=(png.getvalue(),))
    assert as_item({"text": "a", "image": str(file)}) == Item(text="a", images=(file,))
    assert as_item({"image": [file, str(file)], "instruction": "i"}) == Item(images=(file, file), instruction="i")
    assert as_item({"image": "https://a/b.png"}) == Item(images=("https://a/b.png",))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "is of type `int`"),
        (None, "is of type `NoneType`"),
        ({}, "neither a text nor an image"),
        ({"image": []}, "neither a text nor an image"),
        ({"instruction": "i"}, "neither a text nor an image"),
        ({"txt": "a"}, "unknown keys: txt. Known: text, image, instruction"),
        ({"text": 3}, "must be of type `str`"),
        ({"image": 3}, "An image must be a path, bytes or a PIL image, but is of type `int`"),
        ({"image": [torch.zeros(3, 2, 2)]}, "but is of type `Tensor`"),
    ],
)
def test_wrong_inputs_are_errors(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_item(value)


def test_inputs_that_a_model_cannot_take_are_errors(processor: TowerProcessor, folder: Path) -> None:
    with pytest.raises(DataError, match="no image encoder"):
        TowerProcessor(processor.text, None)([Item(images=(image(),))])
    with pytest.raises(DataError, match="no text encoder"):
        TowerProcessor(None, processor.image)([Item(text="a")])
    with pytest.raises(DataError, match="URL"):
        processor([Item(images=("https://example.org/a.png",))])
    with pytest.raises(DataError, match=r"missing\.png"):
        processor([Item(images=(folder / "missing.png",))])
    with pytest.raises(DataError, match=r"^rows\.parquet:row 3: The image of 1 bytes is not an image"):
        processor([Item(images=(image(),)), Item(images=(b"x",), source="rows.parquet:row 3")])


def test_images_are_decoded_one_by_one(
    processor: TowerProcessor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A batch of photographs, all decoded at once, would take gigabytes."""
    file = tmp_path / "i.png"
    image().save(file)
    events = []
    decode, transform = Image.open, processor.image.__call__
    monkeypatch.setattr(Image, "open", lambda *a, **k: (events.append("decode"), decode(*a, **k))[1])

    def transforming(images: Any) -> Any:
        events.append(f"transform {len(list(images))}")
        return transform(images)

    monkeypatch.setattr(processor, "image", transforming)
    processor([Item(images=(file,)) for _ in range(3)])
    assert [e for e in events if e != "decode"] == ["transform 1"] * 3
    assert events.index("transform 1") < len(events) - 1 - events[::-1].index("decode")


def test_the_collator_keeps_pixels_instead_of_images_and_names_the_row(processor: TowerProcessor, folder: Path) -> None:
    collator = Collator(processor)
    rows = [
        Example(Item(text="a"), Item(images=(image(i),)), (Item(images=(image(9),)),) * i, source=f"f:{i}")
        for i in range(2)
    ]
    loaded = [collator.load(r) for r in rows]
    assert isinstance(loaded[0].items[1].pixels[0], torch.Tensor)
    batch = collator(loaded)
    assert batch.num_queries == 2
    assert batch.document.num_rows == 3
    expected = processor([Item(images=(image(i),)) for i in (0, 1, 9)])
    assert batch.document.images is not None
    assert expected.images is not None
    assert torch.equal(batch.document.images.values, expected.images.values)
    batch.rows.check(2, 3)
    broken = Example(Item(text="a"), Item(images=(folder / "no.png",)), source="data.jsonl:7")
    with pytest.raises(DataError, match=r"data\.jsonl:7: .*no\.png"):
        collator.load(broken)


def test_a_saved_processor_is_the_same(processor: TowerProcessor, tmp_path: Path) -> None:
    processor.settings.prompts = {"query": "q: "}
    processor.settings.max_length = 9
    processor.save(tmp_path / "p")
    again = TowerProcessor.load(tmp_path / "p", BOTH, model_max_length=77, tokens_per_image=5)
    assert again.settings == processor.settings
    assert again.text is not None
    assert again.text.max_length == 9
    items = [Item(text="a photo of the digit three and the number one"), Item(images=(image(),))]
    a, b = processor(items), again(items)
    assert torch.equal(a.images.values, b.images.values)  # type: ignore[union-attr]
    assert b.text is not None
    assert b.text.input_ids.size(1) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": "9"}, "`max_length` must not be '9'"),
        ({"prompts": ["a"]}, "`prompts` must not be"),
        ({"prompts": {"query": 3}}, "`prompts` must hold texts"),
        ({"include_prompt": 1}, "`include_prompt` must not be 1"),
        ({"colour": 1}, "unknown keys: colour"),
    ],
)
def test_a_broken_settings_file_is_an_error(
    processor: TowerProcessor, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    processor.save(tmp_path)
    file = tmp_path / "vembed_processor.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelLoadError, match=message):
        TowerProcessor.load(tmp_path, BOTH)


@pytest.mark.parametrize(
    ("limit", "asked", "expected"), [(15, None, 15), (512, None, 20), (15, 18, 18), (512, 30, 20), (10**30, None, 20)]
)
def test_the_tokenizers_own_limit_counts_unless_a_length_is_asked_for(
    folder: Path, tmp_path: Path, limit: int, asked: int | None, expected: int
) -> None:
    """sentence-transformers takes the smaller of the tokenizer's limit and the positions."""
    tokenizer = TowerProcessor.load(folder, frozenset({"text"})).text
    assert tokenizer is not None
    tokenizer.tokenizer.model_max_length = limit
    tokenizer.save(tmp_path)
    text = TowerProcessor.load(tmp_path, frozenset({"text"}), max_length=asked, model_max_length=20).text
    assert text is not None
    assert text.max_length == expected

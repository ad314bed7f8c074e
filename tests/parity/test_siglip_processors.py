"""Folders of SigLIP: token ids, pixel values and embeddings equal transformers'."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, models, normalizers, trainers
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoModel,
    AutoTokenizer,
    GemmaTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from vembed_fs2.data.example import Item
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.inference.embedder import Embedder
from vembed_fs2.processing.image import ImageProcessor
from vembed_fs2.processing.patches import join_patches, pack_patches
from vembed_fs2.processing.text import TextProcessor
from vembed_fs2.processing.towers import TowerProcessor

SENTENCE = "a photo of the small red cat and two old dogs under an umbrella in front of house number 12"

WORDS = [
    *SENTENCE.split(),
    *("naïve", "café", "Straße", "İstanbul", "ΣΊΣΥΦΟΣ", "東京", "日本語", "한국어", "привет", "мир"),
    *("ﬁne", "½", "①", "ＡＢＣ", "１２", "～", "🙂", "e\u0301te\u0301", "vie\u0323\u0302t"),
]

MARKS = (
    *" \t\n\r\x0b\x1c\xa0\u2003\u200b\u3000\u00ad\ufeff",
    *"!\"#'(),-./:;<=>?@[]^_`{|}~",
    "▁",
    "  ",
    "…",
    "“",
    "’",
    "\r\n",
)

LENGTH = 12

RANDOM = np.random.default_rng(0)


def corpus() -> list[str]:
    draw = np.random.default_rng(1)
    return [" ".join(draw.choice(WORDS[:-5], 6)).lower() for _ in range(300)]


def train_sentencepiece(file: Path, **options: Any) -> None:
    """A model with the special tokens of T5, as SigLIP's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, model_type="unigram", hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.98, minloglevel=2, num_threads=1,
        **{"vocab_size": 150, **options},
    )  # fmt: skip
    file.write_bytes(out.getvalue())


def write_siglip_tokenizer(folder: Path, names: list[str], **options: Any) -> Any:
    """Write the files that ``SiglipTokenizer`` has; return it."""
    train_sentencepiece(folder / "spiece.model", **options)
    from transformers import SiglipTokenizer

    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=LENGTH, model_input_names=names)
    tokenizer.save_pretrained(folder)
    return tokenizer


NORMALIZERS: dict[str, dict[str, Any]] = {
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "identity": {"normalization_rule_name": "identity"},
    "bytes": {"normalization_rule_name": "nmt_nfkc", "byte_fallback": True, "vocab_size": 420},
}


@pytest.fixture(scope="module", params=NORMALIZERS)
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TextProcessor]:
    folder = tmp_path_factory.mktemp("siglip")
    options = dict(NORMALIZERS[request.param])
    reference = write_siglip_tokenizer(folder, ["input_ids"], **options)
    return reference, TextProcessor.load(folder, padding="max_length")


texts = st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(MARKS), st.just(" ")), max_size=14).map("".join)


@settings(max_examples=100)
@given(texts)
def test_token_ids_equal_siglip_tokenizer(tokenizers: tuple[Any, TextProcessor], text: str) -> None:
    reference, processor = tokenizers
    expected = reference([text], padding="max_length", truncation=True)["input_ids"]
    assert processor([text]).input_ids.tolist() == expected
    assert processor([text]).attention_mask is None


@settings(max_examples=40)
@given(texts, st.sampled_from(("</s>", " </s>", "<unk> ")))
def test_special_tokens_in_texts_are_found(tokenizers: tuple[Any, TextProcessor], text: str, token: str) -> None:
    reference, processor = tokenizers
    expected = reference([text + token], padding="max_length", truncation=True)["input_ids"]
    assert processor([text + token]).input_ids.tolist() == expected


def test_the_fast_tokenizer_is_saved_and_loaded_without_sentencepiece(tmp_path: Path) -> None:
    reference = write_siglip_tokenizer(tmp_path, ["input_ids", "attention_mask"], normalization_rule_name="nmt_nfkc")
    processor = TextProcessor.load(tmp_path, padding="max_length")
    processor.save(tmp_path / "saved")
    lines = ["A photo, of the CAT!", "", "two old dogs " * 9, "naïve"]
    expected = reference(lines, padding="max_length", truncation=True)
    for tokens in (processor(lines), TextProcessor.load(tmp_path / "saved", padding="max_length")(lines)):
        assert tokens.input_ids.tolist() == expected["input_ids"]
        assert tokens.attention_mask is not None
        assert tokens.attention_mask.int().tolist() == expected["attention_mask"]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded(lines, padding="max_length", truncation=True)["input_ids"] == expected["input_ids"]
    assert loaded.decode(loaded("red cat")["input_ids"], skip_special_tokens=True) == "red cat"


def message(*fields: tuple[int, Any]) -> bytes:
    """A message of protobuf, with fields of less than 128 bytes."""
    out = b""
    for number, value in fields:
        wire = {bytes: 2, int: 0, float: 5}[type(value)]
        tag = number << 3 | wire
        out += bytes([tag] if tag < 128 else [tag & 127 | 128, tag >> 7])
        if isinstance(value, bytes):
            out += bytes([len(value)]) + value
        else:
            out += bytes([value]) if isinstance(value, int) else struct.pack("<f", value)
    return out


def write_pieces(folder: Path, *extra: tuple[int, Any], config: dict[str, Any] | None = None) -> Path:
    """A model file made by hand: `a`, `b`, `ab` and the space."""
    pieces = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1), ("a", -3.0, 1), ("b", -3.5, 1)]
    fields = [(1, message((1, p.encode()), (2, s), (3, t))) for p, s, t in [*pieces, ("▁ab", -4.0, 1)]]
    folder.joinpath("spiece.model").write_bytes(message(*fields, *extra))
    config = {"tokenizer_class": "SiglipTokenizer", "model_max_length": 8} | (config or {})
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_model_file_is_read_without_sentencepiece(tmp_path: Path) -> None:
    processor = TextProcessor.load(write_pieces(tmp_path))
    tokens = processor(["AB, a-b c!", "cc"])
    assert tokens.input_ids.tolist() == [[6, 6, 3, 2, 1], [3, 2, 1, 1, 1]]
    assert processor.max_length == 8
    lines = TextProcessor.load(write_pieces(tmp_path, config={"do_lower_case": False}))(["AB ab"])
    assert lines.input_ids.tolist() == [[3, 2, 6, 1]]


@pytest.mark.parametrize(
    ("extra", "config", "error"),
    [
        ([(2, message((3, 2)))], {}, "`model_type` must be unigram"),
        ([(3, message((4, 0)))], {}, "`remove_extra_whitespaces` must be set"),
        ([(3, message((5, 0)))], {}, "`escape_whitespaces` must be set"),
        ([], {"sp_model_kwargs": {"enable_sampling": True}}, "`sp_model_kwargs`"),
        ([], {"added_tokens_decoder": {"9": {"content": "<x>", "special": True}}}, "'<x>' cannot have the index 9"),
    ],
)
def test_tokenizers_that_are_not_supported_are_errors(
    extra: list[tuple[int, Any]], config: dict[str, Any], error: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=error):
        TextProcessor.load(write_pieces(tmp_path, *extra, config=config))


def test_a_broken_model_file_is_an_error(tmp_path: Path) -> None:
    file = write_pieces(tmp_path) / "spiece.model"
    content = file.read_bytes()
    for broken in (content[:-3], b"\xff" * 9, b"hello", b""):
        file.write_bytes(broken)
        with pytest.raises(ModelLoadError, match="not a model of sentencepiece"):
            TextProcessor.load(tmp_path)


def write_gemma_tokenizer(folder: Path, **options: Any) -> Any:
    """A small tokenizer of the kind that SigLIP 2 has."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    backend.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=150, special_tokens=special))
    names = {"model_input_names": ["input_ids"], "padding_side": "right", "add_bos_token": False} | options
    tokenizer = GemmaTokenizerFast(tokenizer_object=backend, add_eos_token=True, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "attention_mask"]])
@pytest.mark.parametrize("side", ["right", "left"])
def test_token_ids_equal_gemma_tokenizer(names: list[str], side: str, tmp_path: Path) -> None:
    write_gemma_tokenizer(tmp_path, model_input_names=names, padding_side=side)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    processor = TowerProcessor.load(tmp_path, frozenset({"text"}), model_max_length=LENGTH, text_padding="max_length")
    lines = ["a photo of the cat", "Two OLD dogs, 12!", "under an umbrella in front of house number 12 " * 2, ""]
    expected = reference(lines, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    batch = processor([Item(text=line) for line in lines]).text
    assert batch is not None
    assert batch.fixed_width
    if "attention_mask" in names:
        # Padding that is masked is on the right in every batch.
        batch.input_ids = batch.input_ids[batch.attention_mask]
        assert torch.equal(batch.input_ids, expected["input_ids"][expected["attention_mask"].bool()])
    else:
        assert batch.attention_mask is None
        assert torch.equal(batch.input_ids, expected["input_ids"])


def noise(width: int, height: int, channels: int = 3) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze())


def create_images() -> dict[str, Image.Image]:
    photo = Image.fromarray(load_sample_images().images[0]).resize((160, 107))
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    return {
        "photo": photo,
        "grey": photo.convert("L"),
        "RGBA": alpha,
        "LA": alpha.convert("LA"),
        "palette": photo.quantize(64),
        "1bit": photo.convert("1"),
        "CMYK": photo.convert("CMYK"),
        "16bit": Image.fromarray(RANDOM.integers(0, 1 << 16, (40, 50), dtype=np.uint16)),
        "tall": photo.resize((31, 150)),
        "wide": photo.resize((200, 23)),
        "odd": noise(53, 31),
        "strip": noise(3, 300),
        "one_pixel": noise(1, 1),
        "one_high": noise(30, 1),
    }


IMAGES = create_images()

PROCESSORS: dict[str, dict[str, Any]] = {
    "default": {"patch_size": 4, "max_num_patches": 16},
    "fast": {"patch_size": 5, "max_num_patches": 31, "image_processor_type": "Siglip2ImageProcessorFast"},
    "bicubic": {"patch_size": 7, "max_num_patches": 9, "resample": 3, "image_mean": [0.1, 0.2, 0.3]},
    "plain": {"patch_size": 3, "max_num_patches": 40, "do_normalize": False, "do_convert_rgb": True},
}


def write_image_processor(folder: Path, config: dict[str, Any]) -> Path:
    config = {"image_processor_type": "Siglip2ImageProcessor"} | config
    folder.joinpath("preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PROCESSORS)
def test_patches_equal_transformers(name: str, tmp_path: Path) -> None:
    config = {k: v for k, v in PROCESSORS[name].items() if not k.endswith("_type")}
    reference = Siglip2ImageProcessor(**config)
    write_image_processor(tmp_path, PROCESSORS[name])
    processor = TowerProcessor.load(tmp_path, frozenset({"image"}))
    batch = processor([Item(images=(image,)) for image in IMAGES.values()])
    assert batch.images is not None
    assert batch.images.grids is not None
    patches_of_all, mask = batch.images.pad_patches()
    for row, (kind, image) in enumerate(IMAGES.items()):
        # One call for each image, and always channels last: transformers guesses the layout.
        expected = reference(image.convert("RGB"), input_data_format="channels_last", return_tensors="pt")
        length = int(expected["pixel_attention_mask"].sum())
        assert mask[row].sum() == length
        assert torch.equal(batch.images.grids[row, 1:], expected["spatial_shapes"][0])
        patches = patches_of_all[row]
        assert float((patches[:length] - expected["pixel_values"][0, :length]).abs().max()) <= 1e-6, kind
        assert not patches[length:].any()
    assert batch.profile().patches == mask.sum(1).tolist()


def test_patches_are_put_together_again() -> None:
    images = [torch.randn(3, 8, 12), torch.randn(3, 4, 4), torch.randn(3, 20, 4)]
    patches, grids = pack_patches(images, 4)
    assert grids.tolist() == [[1, 2, 3], [1, 1, 1], [1, 5, 1]]
    for image, own, grid in zip(images, patches.split([6, 1, 5]), grids.tolist()):
        assert np.array_equal(join_patches(own.numpy(), grid[1:], 4), image.numpy())
    with pytest.raises(DataError, match="8 x 6 cannot be cut into patches of 4"):
        pack_patches([torch.zeros(3, 6, 8)], 4)


def test_a_naflex_image_processor_is_saved_and_loaded(tmp_path: Path) -> None:
    processor = ImageProcessor.load(write_image_processor(tmp_path, PROCESSORS["bicubic"]))
    assert processor.patch_size == 7
    assert processor.size == (21, 21)
    copy = tmp_path / "copy"
    copy.mkdir()
    processor.save(copy)
    assert torch.equal(ImageProcessor.load(copy)([IMAGES["odd"]]), processor([IMAGES["odd"]]))


TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def randomize(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def unit(features: Tensor) -> Any:
    return normalize(features, dim=-1).numpy()


LINES = ["a photo of the cat", "two old dogs", "red umbrella in front of the house number 12 and two old dogs", "Cat!"]


@torch.no_grad()
@pytest.mark.parametrize("names", [["input_ids"], ["input_ids", "attention_mask"]])
def test_a_folder_of_siglip_gives_the_embeddings_of_transformers(names: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "siglip"
    folder.mkdir()
    tokenizer = write_siglip_tokenizer(folder, names, normalization_rule_name="nmt_nfkc")
    text: dict[str, Any] = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    vision: dict[str, Any] = TOWER | {"image_size": 12, "patch_size": 4}
    model = randomize(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    model.save_pretrained(folder)
    images = SiglipImageProcessor(size={"height": 12, "width": 12})
    images.save_pretrained(folder)

    tokens = tokenizer(LINES, padding="max_length", truncation=True, return_tensors="pt")
    pixels = torch.cat(
        [images(i.convert("RGB"), return_tensors="pt")["pixel_values"] for i in list(IMAGES.values())[:9]]
    )
    expected = unit(model.get_text_features(**tokens)), unit(model.get_image_features(pixels))
    assert_embeds(Embedder.load(folder), *expected)
    Embedder.load(folder).save_hf(tmp_path / "export")
    assert_embeds(Embedder.load(tmp_path / "export"), *expected)
    again = AutoModel.from_pretrained(tmp_path / "export").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "export")(
        LINES, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert np.abs(unit(again.get_text_features(**tokens)) - expected[0]).max() <= 1e-5


def assert_embeds(embedder: Embedder, texts: Any, images: Any) -> None:
    """All together, one by one, and texts with images in one call."""
    inputs = list(IMAGES.values())[: len(images)]
    assert np.abs(embedder.encode(LINES) - texts).max() <= 1e-5
    assert np.abs(embedder.encode(inputs) - images).max() <= 1e-5
    assert (
        np.abs(np.stack([embedder.encode(x) for x in [*LINES, *inputs]]) - np.concatenate([texts, images])).max()
        <= 1e-5
    )
    mixed = embedder.encode([inputs[0], LINES[1], inputs[2], LINES[0]])
    assert np.abs(mixed - np.stack([images[0], texts[1], images[2], texts[0]])).max() <= 1e-5


@torch.no_grad()
def test_a_folder_of_naflex_gives_the_embeddings_of_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "siglip2"
    folder.mkdir()
    write_gemma_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text: dict[str, Any] = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "pad_token_id": 0}
    vision: dict[str, Any] = TOWER | {"patch_size": 4, "num_patches": 9}
    model = randomize(Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)))
    model.save_pretrained(folder)
    processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=20)
    processor.save_pretrained(folder)

    lines = [line.lower() for line in LINES]
    tokens = tokenizer(lines, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    features = [
        model.get_image_features(**processor(i.convert("RGB"), input_data_format="channels_last", return_tensors="pt"))
        for i in IMAGES.values()
    ]
    expected = unit(model.get_text_features(**tokens)), unit(torch.cat(features))
    assert_embeds(Embedder.load(folder), *expected)
    Embedder.load(folder).save_hf(tmp_path / "export")
    assert_embeds(Embedder.load(tmp_path / "export"), *expected)


CASES = ["A Photo of the CAT", "TWO old Dogs", "Straße, ΣΊΣΥΦΟΣ, İstanbul"]


def write_second_siglip(folder: Path, *, naflex: bool, **options: Any) -> Any:
    """SigLIP 2, whose models of one image size are of the first one's type."""
    folder.mkdir()
    tokenizer = write_gemma_tokenizer(folder, **options)
    text: dict[str, Any] = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "pad_token_id": 0}
    vision: dict[str, Any] = TOWER | {"patch_size": 4} | ({"num_patches": 9} if naflex else {"image_size": 12})
    if naflex:
        model = randomize(Siglip2Model(Siglip2Config(text_config=text, vision_config=vision)))
        Siglip2ImageProcessor(patch_size=4, max_num_patches=20).save_pretrained(folder)
    else:
        model = randomize(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
        SiglipImageProcessor(size={"height": 12, "width": 12}).save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def transformers_texts(folder: Path, model: Any, lines: list[str]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(lines, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return unit(model.get_text_features(**tokens))


@torch.no_grad()
@pytest.mark.parametrize("naflex", [True, False])
def test_siglip_2_reads_lower_case_as_it_was_trained(naflex: bool, tmp_path: Path) -> None:
    model = write_second_siglip(tmp_path / "model", naflex=naflex)
    lines = [normalizers.Lowercase().normalize_str(line) for line in CASES]  # as version 5 of transformers
    lower = transformers_texts(tmp_path / "model", model, lines)
    embedder = Embedder.load(tmp_path / "model", device="cpu")
    assert np.abs(embedder.encode(CASES) - lower).max() <= 1e-5

    # What is exported lowers texts in transformers as well.
    embedder.save_hf(tmp_path / "out")
    assert np.abs(transformers_texts(tmp_path / "out", model, CASES) - lower).max() <= 1e-5
    assert np.array_equal(Embedder.load(tmp_path / "out", device="cpu").encode(CASES), embedder.encode(CASES))


@torch.no_grad()
def test_a_folder_of_siglip_2_may_say_that_case_counts(tmp_path: Path) -> None:
    model = write_second_siglip(tmp_path / "model", naflex=True, do_lower_case=False)
    expected = transformers_texts(tmp_path / "model", model, CASES)
    embedder = Embedder.load(tmp_path / "model", device="cpu")
    assert np.abs(embedder.encode(CASES) - expected).max() <= 1e-5
    embedder.save_hf(tmp_path / "out")
    assert np.array_equal(Embedder.load(tmp_path / "out", device="cpu").encode(CASES), embedder.encode(CASES))
    lower = [line.lower() for line in CASES]
    assert np.abs(embedder.encode(lower) - expected).max() > 1e-3


def test_a_lowercasing_normaliser_is_not_added_twice(tmp_path: Path) -> None:
    write_second_siglip(tmp_path / "model", naflex=False)
    for folder in ("one", "two"):
        Embedder.load(tmp_path / ("model" if folder == "one" else "one"), device="cpu").save_hf(tmp_path / folder)
    tokenizers = [json.loads(tmp_path.joinpath(folder, "tokenizer.json").read_text()) for folder in ("one", "two")]
    kinds = [[step["type"] for step in tokenizer["normalizer"]["normalizers"]] for tokenizer in tokenizers]
    assert kinds == [["Lowercase", "Replace"]] * 2

"""Folders of open_clip: loaded whole, with open_clip's own images and tokens, and written again."""

from __future__ import annotations

import html
import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from fairseq2.assets import AssetCard, AssetStore
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizerFast, CLIPModel, CLIPProcessor

from vembed_fs2 import Embedder
from vembed_fs2.cli import VEMBED
from vembed_fs2.data.example import Item
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.formats.folder import ModelFolder, is_open_clip_folder
from vembed_fs2.hub.find import find_model
from vembed_fs2.models.siglip.open_clip import TIMM_TOWERS
from vembed_fs2.processing.open_clip import OpenClipTexts, clean_text
from vembed_fs2.processing.text import TextProcessor
from vembed_fs2.resolver import get_resolver

from . import open_clip_models as models
from .open_clip_models import MODES, SIZES, create_image, create_tokenizer, small_cfg, write_folder

CLIP_VOCAB = 49_408

TEXTS = [
    "A photo of a cat.",
    "  two\n lines,\tand &amp;amp; HTML &lt;b&gt; ",
    "It's THEIRS; they'll say we've 1234 things!!",
    "naïve café – “quotes” … ﬁne ſ",
    "schÃ¶n, not schön",
    "日本語のテキスト и русский текст 🙂🙂",
    "<|endoftext|> is only text here",
    "",
    "a very long text " * 40,
    "under_score and-hyphen",
    "e&#x301; ＦＵＬＬ ΣΑΣ İ",
]


def open_clip_ids(folder: Path) -> Tensor:
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert isinstance(ids, Tensor)
    return ids


def assert_same_ids(embedder: Embedder, folder: Path, pad_id: int = 0) -> None:
    expected = open_clip_ids(folder)
    batch = embedder.processor([Item(text=text) for text in TEXTS]).text
    assert batch is not None
    ids = batch.input_ids
    if batch.attention_mask is not None:
        ids = ids.masked_fill(~batch.attention_mask, pad_id)
    ids = torch.nn.functional.pad(ids, (0, expected.size(1) - ids.size(1)), value=pad_id)
    for text, own, other in zip(TEXTS, ids.tolist(), expected.tolist()):
        assert own == other, text


def assert_same_vectors(folder: Path, embedder: Embedder | None = None, **options: Any) -> None:
    """The same embeddings as of open_clip's own model, transform and tokenizer."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}", return_transform=True)
    images = [create_image(mode, size, seed) for seed, (mode, size) in enumerate(zip(MODES, SIZES))]
    embedder = embedder or Embedder.load(folder, device="cpu")
    with torch.no_grad():
        texts = model.eval().encode_text(open_clip_ids(folder), normalize=True)
        pixels = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
    torch.testing.assert_close(embedder.encode(TEXTS, convert_to_tensor=True), texts, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder.encode(images, convert_to_tensor=True), pixels, rtol=0, atol=1e-5)


def clip_cfg(**text: Any) -> dict[str, Any]:
    return small_cfg(vocab_size=CLIP_VOCAB, context_length=24, **text)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip") / "model"
    write_folder(folder, clip_cfg() | {"init_logit_bias": -10}, {"resize_mode": "squash"})
    return folder


@pytest.mark.parametrize("clean", [None, "whitespace", "canonicalize"])
def test_a_folder_with_clips_tokenizer(tmp_path: Path, clean: str | None) -> None:
    options = {} if clean is None else {"tokenizer_kwargs": {"clean": clean}}
    write_folder(tmp_path, clip_cfg(**options))
    embedder = Embedder.load(tmp_path, device="cpu")
    assert embedder.source.family == "vembed_clip"
    assert_same_ids(embedder, tmp_path)
    assert_same_vectors(tmp_path, embedder)


@settings(max_examples=60)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_token_ids_of_any_text_equal_open_clip(texts: list[str]) -> None:
    # Characters newer than the tables of either library are told apart by neither in the same way.
    texts = ["".join(c for c in text if ord(c) < 0x1FB00 or 0x20000 <= ord(c) < 0x2A6D0) for text in texts]
    ours, theirs = create_tokenizers()
    assert torch.equal(padded_ids(ours, texts), theirs(texts))


@cache
def create_tokenizers() -> tuple[TextProcessor, Any]:
    own = OpenClipTexts(text_cleaning="lower", open_clip_bpe=True)
    processor = TextProcessor(create_tokenizer(), max_length=32, open_clip=own)
    return processor, open_clip.tokenizer.SimpleTokenizer(context_length=32)


def padded_ids(processor: TextProcessor, texts: list[str]) -> Tensor:
    output = processor(texts)
    assert output.attention_mask is not None
    ids = output.input_ids.masked_fill(~output.attention_mask, 0)
    return torch.nn.functional.pad(ids, (0, 32 - ids.size(1)))


def bert_tokenizer(folder: Path) -> BertTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "aeost")]
    folder.mkdir()
    folder.joinpath("vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(str(folder / "vocab.txt"))


def test_a_folder_of_clipa(tmp_path: Path) -> None:
    text = {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    model_cfg = clip_cfg(**text, pool_type="last", no_causal_mask=True)
    model_cfg["vision_cfg"] |= {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    folder = tmp_path / "model"
    write_folder(folder, model_cfg, tokenizer=bert_tokenizer(tmp_path / "vocab"))
    embedder = Embedder.load(folder, device="cpu")
    assert_same_ids(embedder, folder)
    assert_same_vectors(folder, embedder)
    embedder.save_open_clip(tmp_path / "again")
    assert_same_vectors(tmp_path / "again")
    with pytest.raises(VembedError, match=r"cannot express `text.pooling`, `text.causal`"):
        embedder.save_hf(tmp_path / "hf")


def test_a_tokenizers_own_padding_is_used_where_the_model_sees_it(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(tmp_path / "vocab")
    tokenizer.pad_token = "[MASK]"
    folder = tmp_path / "model"
    write_folder(folder, clip_cfg(hf_tokenizer_name="x", pool_type="last"), tokenizer=tokenizer)
    assert ModelFolder.open(folder).dialect == "open_clip"
    embedder = Embedder.load(folder, device="cpu")
    assert embedder.source.config.text.pad_idx == 4
    assert_same_ids(embedder, folder, pad_id=4)
    assert_same_vectors(folder, embedder)


def test_a_folder_of_siglip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"patch_size": 4, "num_heads": 2, "depth": 2, "embed_dim": 16, "img_size": 16}
    monkeypatch.setattr(models, "timm_options", sizes)
    ours = {"model_dim": 16, "num_layers": 2, "num_attn_heads": 2, "ffn_inner_dim": 64, "patch_size": 4}
    monkeypatch.setitem(TIMM_TOWERS, models.TINY_TIMM, ours | {"image_size": 16, "activation": "gelu"})
    text = {"hf_tokenizer_name": "timm/x", "tokenizer_kwargs": {"clean": "canonicalize"}, "norm_kwargs": {"eps": 1e-6}}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    model_cfg = clip_cfg(**text) | {"embed_dim": 16, "init_logit_bias": -10, "custom_text": True}
    model_cfg["vision_cfg"] = models.siglip_vision_cfg(16)
    folder = tmp_path / "model"
    write_folder(folder, model_cfg, {"resize_mode": "squash"}, tokenizer=bert_tokenizer(tmp_path / "vocab"))
    embedder = Embedder.load(folder, device="cpu")
    assert embedder.source.family == "vembed_siglip"
    assert_same_ids(embedder, folder)
    assert_same_vectors(folder, embedder)
    embedder.save_open_clip(tmp_path / "again")
    first, again = (load_file(f / "open_clip_model.safetensors") for f in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert_same_vectors(tmp_path / "again")


def test_export_is_bitwise_and_open_clip_loads_it(clip_folder: Path, tmp_path: Path) -> None:
    assert VEMBED.main(["export", str(clip_folder), str(tmp_path / "out"), "--format", "open_clip"], "vembed") == 0
    first, again = (load_file(f / "open_clip_model.safetensors") for f in (clip_folder, tmp_path / "out"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert_same_vectors(tmp_path / "out")
    embedder, reloaded = (Embedder.load(f, device="cpu") for f in (clip_folder, tmp_path / "out"))
    assert reloaded.source.config == embedder.source.config
    image = create_image("P", (40, 31))
    assert np.array_equal(reloaded.encode(image), embedder.encode(image))
    assert np.array_equal(reloaded.encode(TEXTS), embedder.encode(TEXTS))


def test_transformers_loads_an_export_of_an_open_clip_folder(clip_folder: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(clip_folder, device="cpu")
    embedder.save_hf(tmp_path / "hf")
    assert not is_open_clip_folder(tmp_path / "hf")
    model, processor = CLIPModel.from_pretrained(tmp_path / "hf"), CLIPProcessor.from_pretrained(tmp_path / "hf")
    image = create_image("RGB", (40, 31))
    inputs = processor(text=["a cat"], images=[image], return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    expected = [output.text_embeds[0], output.image_embeds[0]]
    for vector, item in zip(expected, ("a cat", image)):
        torch.testing.assert_close(embedder.encode(item, convert_to_tensor=True), vector, rtol=0, atol=1e-5)
    # Our own reading of it loses nothing: neither how texts are cleaned nor how images are resized.
    reloaded = Embedder.load(tmp_path / "hf", device="cpu")
    odd = create_image("P", (40, 31))
    assert np.array_equal(reloaded.encode(odd), embedder.encode(odd))
    assert np.array_equal(reloaded.encode(TEXTS), embedder.encode(TEXTS))


def test_open_clip_loads_an_export_of_a_model_of_transformers(clip_folder: Path, tmp_path: Path) -> None:
    Embedder.load(clip_folder, device="cpu").save_hf(tmp_path / "hf")
    tmp_path.joinpath("hf", "vembed_processor.json").unlink()
    file = tmp_path / "hf" / "preprocessor_config.json"
    config = json.loads(file.read_text())
    del config["open_clip"]
    file.write_text(json.dumps(config))
    embedder = Embedder.load(tmp_path / "hf", device="cpu")
    embedder.save_open_clip(tmp_path / "out")
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}", return_transform=True)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    image = create_image("RGB", (40, 31))
    with torch.no_grad():
        text = model.eval().encode_text(tokenizer(["a cat"]), normalize=True)[0]
        pixels = model.encode_image(transform(image)[None], normalize=True)[0]
    torch.testing.assert_close(embedder.encode("a cat", convert_to_tensor=True), text, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedder.encode(image, convert_to_tensor=True), pixels, rtol=0, atol=1e-5)


def as_pickle(folder: Path, name: str = "open_clip_pytorch_model.bin") -> None:
    torch.save(load_file(folder / "open_clip_model.safetensors"), folder / name)
    folder.joinpath("open_clip_model.safetensors").unlink()


def as_training_checkpoint(folder: Path) -> None:
    state = {f"module.{k}": v for k, v in load_file(folder / "open_clip_model.safetensors").items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, folder / "open_clip_pytorch_model.bin")
    folder.joinpath("open_clip_model.safetensors").unlink()


def beside_timms_own(folder: Path) -> None:
    """As in the repositories of timm, which hold its image tower as well."""
    folder.joinpath("config.json").write_text(json.dumps({"architecture": "vit_base_patch32_clip_224"}))
    folder.joinpath("model.safetensors").write_bytes(b"of no use")


@pytest.mark.parametrize(
    "change", [as_pickle, lambda f: as_pickle(f, "open_clip_model.bin"), as_training_checkpoint, beside_timms_own]
)
def test_weights_are_read_however_they_are_stored(
    clip_folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "model"))
    change(folder)
    vectors = [Embedder.load(f, device="cpu").encode("a cat") for f in (folder, clip_folder)]
    assert np.array_equal(*vectors)


def remove_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("tok*"), *folder.glob("vocab*"), *folder.glob("merges*"), *folder.glob("special*")):
        file.unlink()


@pytest.mark.parametrize(("causal", "clean"), [(True, None), (False, "canonicalize")])
def test_a_folder_without_a_tokenizer_has_the_one_that_open_clip_brings_along(
    causal: bool, clean: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    options = {} if clean is None else {"tokenizer_kwargs": {"clean": clean}}
    pooling = {} if causal else {"no_causal_mask": True, "pool_type": "last"}
    write_folder(folder, clip_cfg(**options, **pooling))
    remove_tokenizer(folder)
    embedder = Embedder.load(folder, device="cpu")
    assert_same_ids(embedder, folder)
    assert_same_vectors(folder, embedder)

    # An exported folder has the files, and so needs no open_clip.
    if causal:
        for layout in ("open_clip", "hf"):
            embedder.save(tmp_path / layout, layout)
            assert tmp_path.joinpath(layout, "tokenizer.json").is_file()
            assert_same_ids(Embedder.load(tmp_path / layout, device="cpu"), folder)
        tokens = CLIPProcessor.from_pretrained(tmp_path / "hf").tokenizer(["a cat!"])["input_ids"][0]
        assert tokens == [t for t in open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat!"])[0].tolist() if t]


def test_without_open_clip_the_error_names_the_extra(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "model"))
    remove_tokenizer(folder)
    monkeypatch.setattr("vembed_fs2.processing.open_clip.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"pip install 'vembed_fs2\[open-clip\]'\.$") as caught:
        Embedder.load(folder, device="cpu")
    assert str(caught.value).startswith(f"{folder} has no tokenizer")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model_cfg": (lambda f: edit_config(f, lambda c: c.pop("model_cfg")), "must hold `model_cfg`"),
    "no text_cfg": (lambda f: edit_config(f, lambda c: c["model_cfg"].pop("text_cfg")), "`text_cfg`"),
    "broken config": (lambda f: f.joinpath("open_clip_config.json").write_text("{"), "is not valid JSON"),
    "CoCa": (lambda f: edit_config(f, lambda c: c["model_cfg"].update(multimodal_cfg={})), "CoCa"),
    "unknown option": (lambda f: edit_config(f, lambda c: c["model_cfg"].update(new=1)), r"config\.json: `new`"),
    "no weights": (lambda f: f.joinpath("open_clip_model.safetensors").unlink(), "has no weights"),
    "no tokenizer": (
        lambda f: (
            remove_tokenizer(f),
            edit_config(f, lambda c: c["model_cfg"]["text_cfg"].update(hf_tokenizer_name="google-t5/t5-base")),
        ),
        "has no tokenizer.*google-t5/t5-base",
    ),
    "preprocessing": (lambda f: edit_config(f, lambda c: c["preprocess_cfg"].update(mode="L")), "preprocess_cfg.mode"),
    "tokenizer mode": (
        lambda f: edit_config(f, lambda c: c["model_cfg"]["text_cfg"].update(tokenizer_mode="clips")),
        "text_cfg.tokenizer_mode` is 'clips'",
    ),
    "tokenizer option": (
        lambda f: edit_config(f, lambda c: c["model_cfg"]["text_cfg"].update(tokenizer_kwargs={"reduction_mask": "s"})),
        "text_cfg.tokenizer_kwargs.reduction_mask` is not supported",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_errors_that_name_them(clip_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "model"))
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        Embedder.load(folder, device="cpu")
    assert str(folder) in str(caught.value)


def test_another_tokenizer_than_clips_must_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_folder(folder, clip_cfg(), tokenizer=bert_tokenizer(tmp_path / "vocab"))
    with pytest.raises(ModelLoadError, match="hf_tokenizer_name"):
        Embedder.load(folder, device="cpu")


def test_plain_texts_need_no_ftfy_and_others_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_text(" Plain\t ASCII, <b>\n", "lower") == "plain ascii, <b>"
    for text in ("naïve", "a &amp; b", "bell \a"):
        with pytest.raises(VembedError, match=r"vembed_fs2\[open-clip\]"):
            clean_text(text, "lower")


@settings(max_examples=60)
@given(st.text(alphabet=st.characters(max_codepoint=126), max_size=40))
def test_plain_texts_are_cleaned_as_by_open_clip(text: str) -> None:
    for cleaning in ("lower", "whitespace", "canonicalize"):
        assert clean_text(text, cleaning) == open_clip.tokenizer.get_clean_fn(cleaning)(text)
        escaped = html.escape(text)
        assert clean_text(escaped, cleaning) == open_clip.tokenizer.get_clean_fn(cleaning)(escaped)


def test_a_local_card_needs_no_architecture(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = AssetCard("mine", {"model_family": "vembed_clip", "checkpoint": str(clip_folder)}, None)
    store = get_resolver().resolve(AssetStore)
    monkeypatch.setattr(type(store), "maybe_retrieve_card", lambda self, name: card)
    source = find_model("mine")
    assert source.config == find_model(clip_folder).config
    assert source.folder == clip_folder

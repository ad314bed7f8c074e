"""Folders as version 5 of transformers and versions 5.4 and later of sentence-transformers write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Transformer
from tokenizers import normalizers

from vembed_fs2 import Embedder
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.processing.text import TextProcessor

from .text_backbones import TEXTS, add_noise, edit, write_bpe, write_wordpiece

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
TEXT_TOWER = TOWER | {"vocab_size": 400, "max_position_embeddings": 24, "eos_token_id": 2}
VISION_TOWER = TOWER | {"image_size": 16, "patch_size": 8}
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def as_version_5(folder: Path, **changes: Any) -> None:
    """Say what version 5 says of a tokenizer."""
    edit(folder / "tokenizer_config.json", backend="tokenizers", tokenizer_class="TokenizersBackend", **changes)
    folder.joinpath("special_tokens_map.json").unlink(missing_ok=True)


def images() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((16, 16), (20, 31))]


@pytest.mark.parametrize("kls", ["TokenizersBackend", "Siglip2Tokenizer", "GemmaTokenizerOfVersion7"])
def test_tokenizers_of_unknown_classes_are_read_by_their_file(tmp_path: Path, kls: str) -> None:
    write_bpe(tmp_path, "RobertaTokenizerFast", SPECIAL)
    expected = TextProcessor.load(tmp_path)(TEXTS)

    edit(tmp_path / "tokenizer_config.json", tokenizer_class=kls)
    found = TextProcessor.load(tmp_path)(TEXTS)

    assert torch.equal(found.input_ids, expected.input_ids)
    assert found.attention_mask is not None
    assert found.token_type_ids is None


def test_a_list_of_special_tokens_is_read(tmp_path: Path) -> None:
    write_bpe(tmp_path, "RobertaTokenizerFast", SPECIAL)
    as_version_5(tmp_path, extra_special_tokens=["<one>", {"content": "<two>", "__type": "AddedToken"}])

    processor = TextProcessor.load(tmp_path)

    assert processor.tokenizer.additional_special_tokens == ["<one>", "<two>"]
    processor.save(tmp_path / "saved")
    assert "backend" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_a_broken_list_of_special_tokens_is_refused(tmp_path: Path) -> None:
    write_bpe(tmp_path, "RobertaTokenizerFast", SPECIAL)
    as_version_5(tmp_path, extra_special_tokens=[1])

    with pytest.raises(ModelLoadError, match="extra_special_tokens"):
        TextProcessor.load(tmp_path)


def test_the_class_of_version_4_changes_no_tokenizer_of_version_5(tmp_path: Path) -> None:
    """BERT's lowercases texts, if the configuration does not say otherwise."""
    write_wordpiece(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("do_lower_case", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"backend": "tokenizers"}))

    ids = TextProcessor.load(tmp_path)(["a MAN"]).input_ids.tolist()

    assert ids == [tokenizer.backend_tokenizer.encode("a MAN").ids]


@pytest.mark.parametrize("generation", ["Siglip", "Siglip2", "CLIP"])
@pytest.mark.parametrize("kind", ["Text", "Vision"])
def test_towers_without_their_prefix(tmp_path: Path, generation: str, kind: str) -> None:
    values = dict(TEXT_TOWER if kind == "Text" else VISION_TOWER)
    if generation == "Siglip2" and kind == "Vision":
        values |= {"num_patches": 4}
        del values["image_size"]
    config = getattr(transformers, f"{generation}{kind}Config")(**values)
    torch.manual_seed(0)
    model = getattr(transformers, f"{generation}{kind}Model")(config)
    add_noise(model)
    folder = tmp_path / "older"
    model.save_pretrained(folder)
    write_bpe(folder, "PreTrainedTokenizerFast", SPECIAL)
    edit(folder / "tokenizer_config.json", model_max_length=20)
    if kind == "Vision":
        options = {"patch_size": 8} if generation == "Siglip2" else {"size": {"height": 16, "width": 16}}
        if generation == "CLIP":
            options["do_center_crop"] = False
        getattr(transformers, f"{generation}ImageProcessor")(**options).save_pretrained(folder)

    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    prefix = f"{kind.lower()}_model."
    tensors = load_file(folder / "model.safetensors")
    assert all(name.startswith(prefix) for name in tensors)
    save_file({name.removeprefix(prefix): t for name, t in tensors.items()}, newer / "model.safetensors")

    inputs: list[Any] = list(TEXTS) if kind == "Text" else images()
    embedder = Embedder.load(newer)
    vectors = embedder.encode(inputs)
    assert np.abs(vectors - Embedder.load(folder).encode(inputs)).max() <= 1e-6

    embedder.save_hf(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.parametrize("ratio", [4, 2.5])
def test_mlp_ratio_of_dinov2_stays_an_integer(tmp_path: Path, ratio: float) -> None:
    """Version 5 takes no other."""
    values = {name: value for name, value in VISION_TOWER.items() if name != "intermediate_size"}
    transformers.Dinov2Model(transformers.Dinov2Config(**values, mlp_ratio=ratio)).save_pretrained(tmp_path / "model")
    size = {"height": 16, "width": 16}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "model")

    Embedder.load(tmp_path / "model").save_hf(tmp_path / "saved")

    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["mlp_ratio"]
    assert (saved, type(saved)) == (ratio, type(ratio))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of transformers with CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=TEXT_TOWER, vision_config=VISION_TOWER, projection_dim=16)
    model = transformers.CLIPModel(config)
    add_noise(model)
    model.save_pretrained(folder)
    write_bpe(folder, "PreTrainedTokenizerFast", SPECIAL)
    edit(folder / "tokenizer_config.json", model_max_length=20)
    size = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder)
    return folder


def write_sentence_clip(clip: Path, folder: Path) -> SentenceTransformer:
    transformer = Transformer(str(clip), processor_kwargs={"use_fast": False})
    model = SentenceTransformer(
        modules=[transformer, Normalize()], prompts={"query": "the man "}, default_prompt_name="query", device="cpu"
    )
    model.save(str(folder))
    return model


def test_a_transformer_module_of_texts_and_images(clip: Path, tmp_path: Path) -> None:
    reference = write_sentence_clip(clip, tmp_path / "model")
    embedder = Embedder.load(tmp_path / "model")

    assert embedder.processor.settings.prompts["query"] == "the man "
    for inputs in (list(TEXTS), images()):
        expected = reference.encode(inputs)
        assert np.abs(embedder.encode(inputs) - expected).max() <= 1e-5

    # The folder that we write has the module of older versions, and the prompts.
    embedder.save_sentence_transformers(tmp_path / "saved")
    saved = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert np.abs(saved.encode(list(TEXTS)) - reference.encode(list(TEXTS))).max() <= 1e-5


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"processing_kwargs": {"image": {"do_resize": False}}}, "processing_kwargs.image"),
        ({"processing_kwargs": {"text": {"truncation": False}}}, "processing_kwargs.text.truncation"),
        ({"processing_kwargs": {"text": {"max_length": "7"}}}, "max_length"),
        ({"model_kwargs": {"attn_mask": "own"}}, "model_kwargs.attn_mask"),
        ({"module_output_name": "token_embeddings"}, "module_output_name"),
        ({"query_expansion": {}}, "query_expansion"),
    ],
)
def test_what_such_a_module_cannot_do_here_is_refused(
    clip: Path, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    write_sentence_clip(clip, tmp_path / "model")
    edit(tmp_path / "model" / "sentence_bert_config.json", **changes)

    with pytest.raises(ModelLoadError, match=name):
        Embedder.load(tmp_path / "model")


def test_such_a_module_says_how_long_a_text_may_be(clip: Path, tmp_path: Path) -> None:
    write_sentence_clip(clip, tmp_path / "model")
    edit(
        tmp_path / "model" / "sentence_bert_config.json",
        processing_kwargs={"text": {"padding": "max_length", "max_length": 7}},
    )

    assert Embedder.load(tmp_path / "model").processor.settings.max_length == 7

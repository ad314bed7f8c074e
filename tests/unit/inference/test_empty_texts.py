"""A text without tokens has one embedding, whatever else is encoded with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.parity.text_backbones import make_hf
from vembed_fs2 import Embedder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.embedding.head import pool
from vembed_fs2.files import write_json
from vembed_fs2.formats.folder import HEAD_FILE, IMAGE_HEAD_FILE

WORDS = ["red", "green", "blue", "old", "new"]

BATCHES = [[""], ["", ""], ["red", "", "old new"], ["red green blue old new " * 3, "", " ", "new"]]

POOLINGS = ("cls", "last", "max", "mean", "weightedmean", "mean_sqrt_len", "gem", "none", ["cls", "mean"])

SIZES = {
    "vocab_size": 10,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}

DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}

FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "pad_token_id": 1, "max_position_embeddings": 34},
    "MPNet": {**SIZES, "pad_token_id": 1, "max_position_embeddings": 34},
    "DistilBert": {"vocab_size": 10, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "pad_token_id": 0},
    "ModernBert": {**SIZES, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3},
    "Albert": {**SIZES, "embedding_size": 8},
    "Electra": {**SIZES, "embedding_size": 8},
    "GPT2": {"vocab_size": 10, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "Qwen2": DECODER,
    "Qwen3": {**DECODER, "is_causal": False},  # In a causal one the first token sees no other.
    "DebertaV2": {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
}


def write(folder: Path, name: str, head: dict[str, Any] | None = None) -> Embedder:
    """A random model with a tokenizer of words, which adds no special tokens."""
    make_hf(name, FAMILIES[name]).save_pretrained(folder)
    pad = FAMILIES[name].get("pad_token_id", 0)
    words = ["[PAD]", "[UNK]", *WORDS] if pad == 0 else ["[UNK]", "[PAD]", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    tokenizer.save_pretrained(folder)
    if head is not None:
        write_json(folder / HEAD_FILE, head)
    return Embedder.load(folder, device="cpu")


def assert_one_answer(embedder: Embedder) -> None:
    alone = embedder.encode("")
    assert np.isfinite(alone).all()
    for texts in BATCHES:
        for text, vector in zip(texts, embedder.encode(texts)):
            assert np.isfinite(vector).all()
            expected = alone if not text.strip() else embedder.encode(text)
            assert vector.shape == expected.shape
            assert np.abs(vector - expected).max(initial=0.0) <= 1e-6
            assert np.isfinite(embedder.similarity(alone, vector)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_one_answer(tmp_path: Path, family: str) -> None:
    assert_one_answer(write(tmp_path / "m", family))


@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("family", ["Bert", "ModernBert", "Qwen3"])
def test_every_pooling_gives_one_answer(tmp_path: Path, family: str, pooling: Any) -> None:
    embedder = write(tmp_path / "m", family, {"pooling": pooling})
    assert_one_answer(embedder)
    assert not np.any(embedder.encode("", raw=True))


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Albert"])
def test_a_pooler_gives_one_answer(tmp_path: Path, family: str) -> None:
    assert_one_answer(write(tmp_path / "m", family, {"pooling": "pooler"}))


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "none"])
def test_a_prompt_that_is_left_out_may_leave_nothing(tmp_path: Path, pooling: str) -> None:
    embedder = write(tmp_path / "m", "Bert", {"pooling": pooling, "include_prompt": False})
    alone = embedder.encode("", prompt="red ", raw=True)
    assert np.isfinite(alone).all()
    assert not np.any(alone)
    for vector in embedder.encode(["", "new old", ""], prompt="red ", raw=True)[::2]:
        assert np.array_equal(vector, alone)


def test_special_tokens_are_tokens(tmp_path: Path) -> None:
    """A text of special tokens alone has an embedding as before."""
    write(tmp_path / "m", "Bert")
    file = tmp_path / "m" / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.post_processor = TemplateProcessing(single="red $A new", special_tokens=[("red", 2), ("new", 6)])
    backend.save(str(file))
    embedder = Embedder.load(tmp_path / "m", device="cpu")
    assert np.any(embedder.encode("", raw=True))
    assert_one_answer(embedder)


@pytest.mark.parametrize("pooling", ["cls", "last", "max", "mean", "weightedmean", "mean_sqrt_len", "gem"])
def test_gradients_are_finite(pooling: str) -> None:
    states = torch.randn(3, 4, 5, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    pooled = pool(states, mask, pooling)
    pooled.square().sum().backward()
    assert not pooled[1].any()
    assert states.grad is not None
    assert states.grad.isfinite().all()
    assert not states.grad[1].any()
    assert torch.equal(pooled[[0, 2]], pool(states[[0, 2]], mask[[0, 2]], pooling))


@pytest.mark.parametrize("pooling", ["pooler", "mean", "last", "max"])
def test_clip_gives_one_answer(tmp_path: Path, pooling: str) -> None:
    write_model_folder(tmp_path / "m")
    write_json(tmp_path / "m" / IMAGE_HEAD_FILE, {"pooling": pooling})
    file = tmp_path / "m" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = None
    file.write_text(json.dumps(content))
    assert_one_answer(Embedder.load(tmp_path / "m", device="cpu"))

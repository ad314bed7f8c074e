"""Small models and data that all integration tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = ["red", "green", "blue", "black", "white", "small", "large", "old", "new", "round", "square", "heavy", "light"]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train.jsonl`` and ``held_out.jsonl``: captions and images of digits."""
    from vembed_fs2.demo.images import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small CLIP; it has no dropout."""
    from vembed_fs2.demo.images import write_model_folder

    folder = tmp_path_factory.mktemp("models") / "clip"
    write_model_folder(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a small BERT with dropout."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.joinpath("vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 83 rows: three words, and the same words with others between them."""
    draw = random.Random(0)
    rows = []
    for _ in range(83):
        words = draw.sample(WORDS, 3)
        rows.append({"query": " ".join(words), "positive": " ".join(w for x in words for w in (x, draw.choice(WORDS)))})
    file = tmp_path_factory.mktemp("texts") / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

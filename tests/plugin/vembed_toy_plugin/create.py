"""Writes a model with random weights and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from vembed_toy_plugin.bag import TOY_BAG_FORMAT, ToyBagConfig, ToyBagModel

SPECIAL = ("<pad>", "<unk>")
WORDS = ("the", "red", "blue", "green", "small", "large", "old", "cat", "dog", "bird", "fish", "runs", "sings", "swims")


def create_model_folder(folder: Path) -> None:
    torch.manual_seed(0)
    config = ToyBagConfig(vocab_size=len(SPECIAL + WORDS))
    model = ToyBagModel(config)
    TOY_BAG_FORMAT.save(folder, dict(model.state_dict()), config)
    create_tokenizer().save_pretrained(folder)


def create_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )

"""Small tokenizers of the kinds that the families have, in classes of the version at hand."""

from __future__ import annotations

import json
from random import Random
from typing import Any, Final

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .families import WORDS, Tokens, Values, is_version_5

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-äöüß"

_BERT: Final = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

_ROBERTA: Final = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}

_PLAIN: Final = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}

_LIKE_ROBERTA: Final = ("roberta", "xlm-roberta", "camembert", "mpnet")

_WITH_START: Final = (*_LIKE_ROBERTA, "bert", "distilbert", "modernbert", "clip", "clip_text_model")

_WITH_TYPES: Final = ("bert", "albert", "deberta-v2")

_DECODERS: Final = (
    "gemma", "gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "stablelm",
)  # fmt: skip

_OWN_CLASSES: Final = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "mpnet": "MPNetTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "t5": "T5Tokenizer",
    "clip": "CLIPTokenizer",
    "clip_text_model": "CLIPTokenizer",
    "llama": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "siglip2": "Siglip2Tokenizer",
}
"""In version 5, each makes the normaliser and the splitter itself."""

_FULL_WIDTH: Final = ("clip", "siglip", "siglip2")
"""Their texts have the tokenizer's full length."""

_FIXED: Final = ("qwen2", "siglip2", "siglip2_text_model")
"""Version 5 reads each of these as its own class, whatever a folder says. So theirs are built alike."""

_QWEN_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(rng: Random, kind: Tokens, model_type: str) -> Any:
    """Train a tokenizer, and put it into the family's own class or into the general one."""
    special = dict(_ROBERTA if model_type in _LIKE_ROBERTA else _BERT if kind == "wordpiece" else _PLAIN)
    if model_type == "modernbert":
        special |= {"cls_token": "<bos>", "sep_token": "<eos>", "mask_token": "<mask>"}

    own = _OWN_CLASSES.get(model_type) if rng.random() < 0.5 else None
    if own is not None and kind != "wordpiece" and not is_version_5():
        own = None  # Version 5 would not read what other classes of version 4 do to texts, only their vocabulary.

    lowers = rng.random() < 0.5
    backend = _train(rng, kind, model_type, special, lowers=lowers)
    backend.post_processor = _frame(rng, backend, model_type, special)

    options: Values = dict(special)
    if rng.random() < 0.5 or model_type in _FULL_WIDTH:
        options["model_max_length"] = rng.choice((12, 24, 30))
    if rng.random() < 0.5:
        options["additional_special_tokens"] = ["<one>", "<two>"]  # Version 5 has another name for these.
    is_siglip = model_type.startswith("siglip") and not model_type.startswith("siglip2")
    names = ["input_ids", *([] if is_siglip else ["attention_mask"])]
    options["model_input_names"] = names + (["token_type_ids"] if model_type in _WITH_TYPES else [])
    options["padding_side"] = rng.choice(("left", "right")) if model_type in _DECODERS else "right"

    tokenizer = _wrap(own, backend, options, lowers=lowers)
    if rng.random() < 0.3:
        tokenizer.add_tokens([AddedToken("Faust", normalized=False)])
    return tokenizer


def _wrap(own: str | None, backend: Tokenizer, options: Values, *, lowers: bool) -> Any:
    if own is None:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)

    if own in ("BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer"):
        options = options | {"do_lower_case": lowers}
    if not is_version_5():
        kls = getattr(transformers, f"{own}Fast", transformers.PreTrainedTokenizerFast)
        return kls(tokenizer_object=backend, **options)

    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):
        vocab = [(piece, score) for piece, score in vocab]
    merges = {"merges": [tuple(merge) for merge in model["merges"]]} if "merges" in model else {}
    return getattr(transformers, own)(vocab=vocab, **merges, **options)


def _frame(rng: Random, backend: Tokenizer, model_type: str, special: Values) -> Any:
    """Say which special tokens stand before and after a text."""
    start = special.get("cls_token") or special["bos_token"]
    end = special.get("sep_token") or special["eos_token"]
    has_start = model_type in _WITH_START or (model_type != "t5" and rng.random() < 0.5)
    single = f"{start} $A {end}" if has_start else f"$A {end}"
    ids = [(token, backend.token_to_id(token)) for token in dict.fromkeys((start, end))]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1 {end}:1", special_tokens=ids)


def _train(rng: Random, kind: Tokens, model_type: str, special: Values, *, lowers: bool) -> Tokenizer:
    corpus = [" ".join(rng.choices(WORDS, k=8)) for _ in range(60)] + list(_LETTERS)
    tokens, size = list(dict.fromkeys(special.values())), rng.randint(180, 260)
    options: Values = {"vocab_size": size, "special_tokens": tokens, "show_progress": False}
    lower = [normalizers.Lowercase()] if lowers else []

    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=special["unk_token"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowers)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(**options)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token=special["unk_token"], **options)
    elif model_type.startswith("siglip2"):
        tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"], fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(**options)
    else:
        tokenizer = Tokenizer(models.BPE())
        levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=model_type != "qwen2")
        tokenizer.pre_tokenizer = levels
        if lower:
            tokenizer.normalizer = lower[0]
        if model_type == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, levels])
        tokenizer.decoder = decoders.ByteLevel()
        options |= {"vocab_size": size + 256, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer = trainers.BpeTrainer(**options)

    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer

"""The tokenizer of the first SigLIP as a fast one.

transformers has it in Python only (``SiglipTokenizer``), on top of the
sentencepiece library. Here the pieces of ``spiece.model`` and the cleaning of
texts become a tokenizer of the ``tokenizers`` library: batches at a time, in
several threads, saved as ``tokenizer.json``.

Token ids are the same but for rare texts: with a special token spelled out before
its end, or in other letters that transformers takes for one (``</S>``, full-width
characters); with combining marks that no single character stands for, or
half-width katakana with a voicing mark apart.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.files import read_json

_MODEL_FILE: Final = "spiece.model"

_CLASSES: Final = ("SiglipTokenizer", "SiglipTokenizerFast")

_GEMMA_CLASSES: Final = ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer")

_SPACE: Final = "▁"
"""What sentencepiece writes for a space."""

_PUNCTUATION: Final = r"[!-/:-@\[-`{-~]"
"""The punctuation of ASCII, which SigLIP removes."""

_WHITESPACE: Final = "[\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
"""What ``\\s`` means in Python; in other libraries it leaves out some."""

_UNIGRAM: Final = 1
_UNKNOWN: Final = 2


def is_siglip_tokenizer(folder: Path) -> bool:
    """Whether a model folder has the tokenizer of the first SigLIP, in sentencepiece's format."""
    if not folder.joinpath(_MODEL_FILE).is_file():
        return False

    name = _read_config(folder).get("tokenizer_class")
    if name is None and folder.joinpath("config.json").is_file():
        return read_json(folder / "config.json").get("model_type") == "siglip"
    return name in _CLASSES


def reads_lower_case(folder: Path) -> bool:
    """Whether a model folder is of SigLIP 2, which was trained on texts in lower case, and does not say otherwise.

    Its tokenizer is Gemma's, which takes letters as they are. open_clip and version 5 of transformers lower them.
    """
    file = folder / "config.json"
    model_type = str(read_json(file).get("model_type")) if file.is_file() else ""

    # The models of one image size are of the first SigLIP's type.
    config = _read_config(folder)
    is_second = model_type.startswith("siglip2") or (
        model_type.startswith("siglip") and config.get("tokenizer_class") in _GEMMA_CLASSES
    )
    return is_second and config.get("do_lower_case") is not False


def load_siglip_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder of SigLIP.

    :raises ModelLoadError: a file is broken, or says something that is not supported.
    """
    config = _read_config(folder)
    if config.get("sp_model_kwargs"):
        raise ModelLoadError(f"{folder}: `sp_model_kwargs` of the tokenizer is not supported.")

    pieces = _SentencePieces.load(folder / _MODEL_FILE)
    backend = Tokenizer(models.Unigram(pieces.scores, pieces.unk_id, pieces.byte_fallback))
    backend.normalizer = _create_normalizer(pieces, lowercase=config.get("do_lower_case", True))

    # No pre-tokenizer: pieces are sought in the whole text.
    backend.decoder = decoders.Metaspace(_SPACE, "first", split=False)
    tokens = _add_special_tokens(backend, config, folder)
    eos = str(tokens["eos_token"])
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, backend.token_to_id(eos))]
    )

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **tokens,
        model_max_length=config.get("model_max_length", 64),
        model_input_names=config.get("model_input_names", ["input_ids", "attention_mask"]),
        padding_side=config.get("padding_side", "right"),
        truncation_side=config.get("truncation_side", "right"),
        clean_up_tokenization_spaces=False,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _create_normalizer(pieces: _SentencePieces, *, lowercase: bool) -> normalizers.Normalizer:
    """First what SigLIP does to texts, then what sentencepiece does."""
    steps = [normalizers.Replace(_SPACE, " ")]
    if lowercase:
        steps.append(normalizers.Lowercase())

    steps += [normalizers.Replace(Regex(_PUNCTUATION), ""), normalizers.Replace(Regex(_WHITESPACE), " ")]
    if pieces.charsmap:
        # sentencepiece composes characters by its map, whole sequences of them; the tokenizers library one by one.
        steps += [normalizers.NFC(), normalizers.Precompiled(pieces.charsmap)]
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))

    # A space comes before the text, and if it is read as one, others after it are one too many.
    steps += [normalizers.Strip(left=pieces.reads_space, right=True), normalizers.Replace(" ", _SPACE)]
    steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence(steps)


def _add_special_tokens(backend: Tokenizer, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Add what the configuration says; return the tokens that have a role, by its name."""
    by_content: dict[str, AddedToken] = {}
    for idx, values in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        token = by_content[values["content"]] = AddedToken(**values)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != int(idx):
            raise ModelLoadError(f"{folder}: the token '{token.content}' cannot have the index {idx}.")

    tokens: dict[str, Any] = {}
    for role, default in (("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", "</s>")):
        value = config.get(role) or default
        content = value if isinstance(value, str) else value["content"]
        added = AddedToken(content, lstrip=True, rstrip=True, normalized=False, special=True)
        tokens[role] = by_content.setdefault(content, added)

    backend.add_special_tokens(list(tokens.values()))
    return tokens


@dataclass
class _SentencePieces:
    """What a model file of sentencepiece holds.

    It is a message of protobuf, ``ModelProto`` of sentencepiece_model.proto;
    the few fields are read here, since neither library need be installed.
    """

    scores: list[tuple[str, float]] = field(default_factory=list)
    unk_id: int | None = None
    byte_fallback: bool = False
    charsmap: bytes = b""
    """What characters are replaced with; empty if they stay."""

    @staticmethod
    def load(file: Path) -> _SentencePieces:
        pieces = _SentencePieces()
        try:
            for number, value in _read_message(file.read_bytes()):
                if number == 1:
                    pieces._add_piece(dict(_read_message(value)))
                elif number == 2:
                    pieces._read_trainer(dict(_read_message(value)), file)
                elif number == 3:
                    pieces._read_normalizer(dict(_read_message(value)), file)
        except (ValueError, IndexError, KeyError, TypeError, struct.error) as ex:
            raise ModelLoadError(f"{file} is not a model of sentencepiece: {ex}.") from None

        if pieces.unk_id is None:
            raise ModelLoadError(f"{file} is not a model of sentencepiece: it has no unknown token.")

        return pieces

    def _add_piece(self, values: Mapping[int, Any]) -> None:
        (score,) = struct.unpack("<f", values.get(2, bytes(4)))
        if values.get(3) == _UNKNOWN:
            self.unk_id = len(self.scores)
        self.scores.append((values[1].decode(), score))

    def _read_trainer(self, values: Mapping[int, Any], file: Path) -> None:
        if values.get(3, _UNIGRAM) != _UNIGRAM:
            raise ModelLoadError(f"{file}: `model_type` must be unigram.")
        self.byte_fallback = bool(values.get(35, 0))

    def _read_normalizer(self, values: Mapping[int, Any], file: Path) -> None:
        for number, name in ((4, "remove_extra_whitespaces"), (5, "escape_whitespaces")):
            if not values.get(number, 1):
                raise ModelLoadError(f"{file}: `{name}` must be set.")
        self.charsmap = values.get(2, b"")

    @property
    def reads_space(self) -> bool:
        """Whether the map of characters takes `▁` for a space."""
        return bool(self.charsmap) and normalizers.Precompiled(self.charsmap).normalize_str(_SPACE) == " "


def _read_message(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: number, and an integer or bytes."""
    at = 0
    while at < len(data):
        tag, at = _read_integer(data, at)
        if tag & 7 == 0:
            value, at = _read_integer(data, at)
            yield tag >> 3, value
            continue

        if tag & 7 == 2:
            size, at = _read_integer(data, at)
        else:
            size = {1: 8, 5: 4}[tag & 7]

        if at + size > len(data):
            raise ValueError("it is truncated")

        yield tag >> 3, data[at : at + size]
        at += size


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7

"""What errors say of names that are not known, and how they go from one process to another."""

from __future__ import annotations

import json

import pytest

from vembed_fs2.errors import (
    ConfigError,
    DataError,
    ModelLoadError,
    VembedError,
    did_you_mean,
    pack_error,
    unpack_error,
)

FAMILIES = ["vembed_auto", "vembed_bert", "vembed_clip", "vembed_modernbert", "vembed_vit"]


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("vembed_clipp", FAMILIES, " Did you mean 'vembed_clip'?"),
        ("bert", FAMILIES, " Did you mean 'vembed_bert'?"),
        ("vit", FAMILIES, " Did you mean 'vembed_vit'?"),
        ("ViT", FAMILIES, " Did you mean 'vembed_vit'?"),
        ("xyz", FAMILIES, ""),
        ("openclip", ["hf", "open_clip"], " Did you mean 'open_clip'?"),
        (
            "BAAI/bge-small-en-v1.5",
            ["baai_bge_small_en_v1.5", "baai_bge_base"],
            " Did you mean 'baai_bge_small_en_v1.5'?",
        ),
        (
            "minilm",
            ["google_bert_base_uncased", "all_minilm_l12_v2", "all_minilm_l6"],
            " Did you mean 'all_minilm_l6'?",
        ),
        ("anything", [], ""),
    ],
)
def test_the_nearest_name_is_suggested(name: str, known: list[str], hint: str) -> None:
    assert did_you_mean(name, known) == hint


def test_several_names_are_suggested_in_a_form_of_their_own() -> None:
    known = ["base_a", "base_bc", "base_def", "other"]
    assert did_you_mean("base", known, most=3) == " Did you mean 'base_a', 'base_bc' or 'base_def'?"
    assert did_you_mean("base", known, most=2, form="`x.{}`".format) == " Did you mean `x.base_a` or `x.base_bc`?"
    assert did_you_mean("base", known, cutoff=0.99) == " Did you mean 'base_a'?"  # It is a word of it.
    assert did_you_mean("bases", known, cutoff=0.99) == ""


class OtherDataError(DataError):
    pass


@pytest.mark.parametrize(
    "error",
    [
        VembedError("a"),
        DataError("file:3: secret"),
        OtherDataError("b"),
        ModelLoadError("c"),
        ConfigError(["one", "secret"], where="secret.yaml"),
    ],
)
def test_an_error_is_the_same_in_another_process(error: VembedError) -> None:
    values = json.dumps(pack_error(error, str(error), lambda text: text.replace("secret", "***")))

    again = unpack_error(json.loads(values))

    assert str(again) == str(error).replace("secret", "***")
    assert isinstance(error, type(again))
    assert isinstance(again, (type(error), DataError))


def test_an_error_of_the_system_becomes_ours() -> None:
    again = unpack_error(pack_error(OSError("disk"), "The disk is full."))
    assert type(again) is VembedError
    assert str(again) == "The disk is full."

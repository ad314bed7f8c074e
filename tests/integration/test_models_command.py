"""``fairseq2 vembed models``: families, architectures and cards, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fairseq2.utils.structured import StandardValueConverter
from ruamel.yaml import YAML

from tests.integration import command_line
from vembed_fs2.cli import VEMBED
from vembed_fs2.hub.find import find_model

MINILM = "sentence_transformers_all_minilm_l6_v2"


@pytest.fixture
def models(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``fairseq2 vembed models`` in this process; returns what it prints."""

    def run(*arguments: object, status: int = 0) -> str:
        assert VEMBED.main(["models", *map(str, arguments)], "fairseq2 vembed") == status
        out, err = capsys.readouterr()
        return err if status else out

    return run


def line_of(output: str, first: str) -> list[str]:
    """The words of the line that starts with ``first``."""
    (line,) = (line.split() for line in output.splitlines() if line.split()[:1] == [first])
    return line


def test_list_prints_families_and_cards(models: Any) -> None:
    output = models("list")
    words = line_of(output, "vembed_clip")
    assert words[3:10] == ["text,", "image", "yes", "yes", "yes", "yes", "no"]
    assert "clip" in " ".join(words[10:]).split(", ")
    assert line_of(output, "openai_clip_vit_base_patch32")[1:] == [
        "vembed_clip",
        "vit_base_patch32",
        "hg://openai/clip-vit-base-patch32",
    ]
    families = {entry["name"]: entry for entry in json.loads(models("list", "--json"))}
    for name, entry in families.items():
        assert line_of(output, name)[1] == f"{len(entry['archs'])}"
        assert all(line_of(output, card)[1] == name for card in entry["cards"])
    assert {"vembed_bert", "vembed_clip"} <= families.keys()
    assert families["vembed_bert"]["modalities"] == ["text"]


def test_list_of_one_family(models: Any) -> None:
    output = models("list", "--family", "vembed_clip")
    assert "vembed_bert" not in output
    assert line_of(output, "openai_clip_vit_base_patch16")


@pytest.mark.parametrize("verb", [["list", "--family"], ["archs"]])
def test_an_unknown_family_is_an_error_with_the_nearest(models: Any, verb: list[str]) -> None:
    assert models(*verb, "vembed_clipp", status=2) == (
        "error: There is no family of embedding models named 'vembed_clipp'. Did you mean 'vembed_clip'?\n"
    )
    assert models(*verb, "bert", status=2).endswith(" 'bert'. Did you mean 'vembed_bert'?\n")
    assert "There are: " in models(*verb, "qqq", status=2)


def test_archs_prints_sizes_and_what_they_are(models: Any) -> None:
    output = models("archs", "vembed_clip")
    words = " ".join(next(line for line in output.splitlines() if " vit_base_patch32 " in line).split())
    assert words == (
        "vembed_clip vit_base_patch32 512 151,277,313 "
        "The base: OpenAI's ViT-B/32, 224 pixels, with their approximation of GELU."
    )
    archs = {entry["arch"]: entry for entry in json.loads(models("archs", "vembed_clip", "--json"))}
    assert archs["vit_large_patch14_336"]["parameters"] == 427_944_193
    assert archs["vit_large_patch14_336"]["summary"] == "vit_large_patch14 on images of 336 pixels."


def test_show_describes_a_card_that_is_not_downloaded(models: Any) -> None:
    output = models("show", MINILM)
    assert line_of(output, "family") == ["family", "vembed_bert"]
    assert line_of(output, "arch") == ["arch", "minilm_l6"]
    assert line_of(output, "parameters") == ["parameters", "22,713,216"]
    assert "embedding   384 dimensions, unit length, compared by cosine" in output
    assert "texts       up to 512 tokens" in output
    assert "images" not in output
    assert "supports    tp yes, fsdp yes, ac yes, compile yes, packed yes" in output
    assert "  model_dim: 384" in output
    assert "    pooling: mean" in output
    content = json.loads(models("show", MINILM, "--json"))
    assert content["config"]["head"]["pooling"] == "mean"
    assert sum(content["parts"].values()) == content["parameters"] == 22_713_216


def test_show_describes_a_folder_and_a_run(models: Any, clip_folder: Path, tmp_path: Path) -> None:
    folder = json.loads(models("show", clip_folder, "--json"))
    assert folder["parts"].keys() == {"logit_scale", "text", "vision"}
    assert folder["modalities"] == ["text", "image"]
    config: Any = StandardValueConverter().unstructure(find_model(clip_folder).config)
    config["projection_dim"] += 8
    tmp_path.joinpath("checkpoints", "step_3", "model").mkdir(parents=True)
    with tmp_path.joinpath("checkpoints", "model.yaml").open("w") as fp:
        YAML(typ="safe").dump({"model_family": "vembed_clip", "model_config": config}, fp)
    run = json.loads(models("show", tmp_path, "--json"))
    assert run["family"] == "vembed_clip"
    assert run["embedding_dim"] == folder["embedding_dim"] + 8
    assert run["parameters"] > folder["parameters"]


def test_show_of_what_is_no_embedding_model_is_an_error(models: Any, tmp_path: Path) -> None:
    assert f"Did you mean '{MINILM}'" in models("show", MINILM + "x", status=2)
    assert "does not exist" in models("show", tmp_path / "nothing", status=2)
    assert "no config.json" in models("show", tmp_path, status=2)
    assert "no family of embedding models named 'llama'" in models("show", "llama3_2_1b", status=2)


def test_the_program_prints_no_stack_trace() -> None:
    result = command_line.run("models", "show", "openai_clip_vit_base_patch_32").expect(2)
    assert "Did you mean 'openai_clip_vit_base_patch32" in result.output

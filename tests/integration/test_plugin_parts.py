"""A package outside the tree adds a pooling, an objective that learns something and a layout, as the guide says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from itertools import product
from pathlib import Path

import pytest

from tests.integration import command_line
from tests.integration.command_line import Result
from tests.integration.test_plugin import ROOT, Workplace

PLUGIN = ROOT / "tests/plugin_parts"

GUIDE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path) -> Workplace:
    """The plugin installed, a tokenizer and data, and the guide's commands run."""
    place = Workplace(tmp_path_factory.mktemp("parts"))
    place.install(PLUGIN)
    shutil.copytree(bert_folder, place.folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    animals = product(["red", "blue", "green", "small", "large", "old"], ["round", "square", "heavy", "light"])
    rows = [{"query": f"{color} {shape}", "positive": f"{shape} {color}"} for color, shape in animals]
    place.folder.joinpath("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in "".join(blocks("bash")).replace("\\\n", " ").splitlines():
        run(place, command).expect(0)
    return place


def run(place: Workplace, command: str) -> Result:
    return command_line.run_forked(shlex.split(command)[1:], place.folder, **place.environment())


def test_code_of_the_guide_is_the_plugins() -> None:
    files = [f.read_text(encoding="utf-8") for f in PLUGIN.rglob("*") if f.suffix in (".py", ".toml")]
    found = [block for language in ("python", "toml") for block in blocks(language)]
    assert len(found) == 5
    for block in found:
        assert any(block in text for text in files), block


def test_the_run_has_the_pooling_and_learns_the_part(place: Workplace) -> None:
    model = place.folder.joinpath("runs/midrange/checkpoints/model.yaml").read_text()
    assert "pooling: midrange" in model
    assert "name: dimension_weights" in model
    done = place.python(
        """
from vembed_fs2 import load_model

model = load_model("runs/midrange")
print("RESULT", model.dimension_weights.shape, bool((model.dimension_weights != 1).any()))
"""
    ).expect(0)
    assert "RESULT torch.Size([384]) True" in done.output


def test_the_layout_is_written_read_and_listed(place: Workplace) -> None:
    assert {"model.json", "weights.npz"} <= {f.name for f in (place.folder / "midrange_numpy").iterdir()}
    done = place.python(
        """
import numpy as np

from vembed_fs2 import Embedder

texts = ["red round", "the small heavy", "old"]
run, folder = (Embedder.load(name, device="cpu") for name in ("runs/midrange", "midrange_numpy"))
print("RESULT", bool(np.array_equal(run.encode(texts), folder.encode(texts))), folder.model.head.config.pooling)
folder.save("again", "numpy")
print("AGAIN", bool(np.array_equal(Embedder.load("again", device="cpu").encode(texts), folder.encode(texts))))
"""
    ).expect(0)
    assert "RESULT True midrange" in done.output
    assert "AGAIN True" in done.output
    wrong = run(place, "fairseq2 vembed export runs/midrange elsewhere --format npy").expect(2)
    assert "numpy" in wrong.output


def test_a_layout_that_has_no_such_pooling_says_so(place: Workplace) -> None:
    wrong = run(place, "fairseq2 vembed export runs/midrange elsewhere --format sentence-transformers").expect(2)
    assert "`head.pooling` is 'midrange', which sentence-transformers does not have" in wrong.output
    assert not place.folder.joinpath("elsewhere").exists()

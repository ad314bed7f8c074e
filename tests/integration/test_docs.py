"""Every shell command of the guides runs, in the order of the guide."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from vembed_fs2.recipes.presets import describe_presets

from .command_line import run_block, run_script

ROOT = Path(__file__).parents[2]

GUIDES = [
    "README.md",
    "docs/first-model.md",
    "docs/choosing-a-model.md",
    "docs/training.md",
    "docs/inference.md",
    "docs/data.md",
    "docs/losses.md",
    "docs/models.md",
    "docs/product-retrieval.md",
]
"""In this order, because later guides use the runs of earlier ones."""

FROM_SCRATCH = ["README.md", "docs/first-model.md"]
"""Each of these begins in an empty folder."""


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / guide).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guides take for granted: training and held-out rows, a BEIR folder; not even a network."""
    folder = tmp_path_factory.mktemp("guides")
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


@pytest.mark.parametrize("guide", [g for g in GUIDES if g not in FROM_SCRATCH])
def test_commands_of_the_guide_run(guide: str, folder: Path) -> None:
    commands = [b for b in blocks(guide, "bash") if not b.startswith("pip install")]
    assert commands
    for command in commands:
        run_block(command, folder)


@pytest.mark.parametrize("guide", FROM_SCRATCH)
def test_a_user_can_begin_with_the_guide_in_an_empty_folder(guide: str, tmp_path: Path) -> None:
    for command in blocks(guide, "bash"):
        if command.startswith("pip install"):
            continue

        for line in command.replace("\\\n", " ").splitlines():
            run_block(line + "\n", tmp_path)
            if "demo data" in line:  # Fewer rows than a user has, to save time.
                shorten(tmp_path / "train.csv", 64)
                shorten(tmp_path / "valid.csv", 16)

    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks(guide, "python")))
    found = run_script(script, cwd=tmp_path).expect(0).output
    assert len(re.findall(r"^-?0\.\d\d .", found, re.MULTILINE)) == 3


def shorten(file: Path, num_rows: int) -> None:
    """Keep the first rows of a CSV file."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[: num_rows + 1]
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)


@pytest.mark.parametrize("guide", ["docs/training.md", "docs/inference.md", "docs/product-retrieval.md"])
def test_python_of_the_guide_runs(guide: str, folder: Path) -> None:
    script = folder / "guide.py"
    script.write_text("\n".join(blocks(guide, "python")))
    run_script(script, cwd=folder).expect(0)


@pytest.mark.parametrize("block", blocks("docs/losses.md", "python"))
def test_each_block_of_the_objectives_guide_runs_by_itself(block: str, tmp_path: Path) -> None:
    script = tmp_path / "guide.py"
    script.write_text(block)
    run_script(script, cwd=tmp_path).expect(0)


def test_training_guide_lists_all_presets() -> None:
    text = (ROOT / "docs/training.md").read_text()
    for line in describe_presets("vembed_fs2.recipes.train").splitlines():
        name, description = line.split(maxsplit=1)
        assert f"| `{name}` | {description} |" in text


def test_models_guide_lists_all_cards() -> None:
    text = (ROOT / "docs/models.md").read_text()
    for file in sorted((ROOT / "assets/cards").glob("*.yaml")):
        for card in YAML(typ="safe", pure=True).load_all(file.read_text()):
            repository = card["checkpoint"].removeprefix("hg://")
            assert f"| `{card['name']}` | `{card['model_arch']}` | {repository} |" in text


def test_the_reference_lists_all_public_names() -> None:
    import vembed_fs2

    text = (ROOT / "docs/api/index.rst").read_text()
    assert set(re.findall(r"`vf\.(\w+) <", text)) == set(vembed_fs2.__all__)


def test_the_picture_of_the_readme_is_drawn_from_the_recorded_results(tmp_path: Path) -> None:
    pictures = ROOT / "docs/pictures"
    run_script(pictures / "demo.py", pictures / "demo.json", tmp_path / "demo.svg").expect(0)
    assert tmp_path.joinpath("demo.svg").read_text() == pictures.joinpath("demo.svg").read_text()


def test_changelog_and_guides_do_not_name_missing_files() -> None:
    for guide in sorted(str(p.relative_to(ROOT)) for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / guide).read_text()):
            assert (ROOT / guide).parent.joinpath(link).exists(), f"{guide}: {link}"

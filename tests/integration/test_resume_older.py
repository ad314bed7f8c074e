"""A run of an older version, whose configuration lacks newer keys, is resumed by the same command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.integration.command_line import run, steps

Arguments = list[object]


def arguments(folder: Path, model: Path, data: Path, num_steps: int, *more: str) -> Arguments:
    return [
        "train", folder, "--no-rich", "--config", f"model.path={model}", f"dataset.paths=[{data}]",
        "dataset.batch_size=8", f"regime.num_steps={num_steps}", "trainer.mixed_precision.mode=off", *more,
    ]  # fmt: skip


def forget(file: Path, *paths: str) -> None:
    """Remove keys from a configuration, as a version that did not have them wrote it."""
    yaml = YAML(typ="safe", pure=True)
    content: Any = yaml.load(file)
    for path in paths:
        *parents, key = path.split(".")
        values = content
        for parent in parents:
            values = values[parent]
        del values[key]
    yaml.dump(content, file)


@pytest.fixture
def older(bert_folder: Path, texts: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    run(*arguments(folder, bert_folder, texts, 1)).expect(0)
    overrides = "model.config_overrides"
    forget(
        folder / "config.yaml", f"{overrides}.head.gem_p", f"{overrides}.head.top_k", "loss.config.directions",
        "grad_cache.chunk_patches", "dataset.max_rows", "dataset.quoting", "freeze", "valid.queries",
    )  # fmt: skip
    return folder


def test_newer_keys_have_their_defaults(older: Path, bert_folder: Path, texts: Path) -> None:
    run(*arguments(older, bert_folder, texts, 2)).expect(0)
    assert steps(older) == [1, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.config_overrides.head.gem_p=2.0", "model.config_overrides.head.gem_p"),
        ("loss.config.directions=[query_to_document,document_to_query]", "loss.config.directions"),
        ("loss.name=triplet", "loss.name"),
    ],
)
def test_a_newer_key_with_another_value_is_refused(
    older: Path, bert_folder: Path, texts: Path, change: str, named: str
) -> None:
    result = run(*arguments(older, bert_folder, texts, 2, change)).expect(2)
    assert f"other values in {named}. Give a new folder" in result.output

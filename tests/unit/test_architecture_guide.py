"""The guide to the architecture names files that exist, and the layers that are checked."""

from __future__ import annotations

import re
from pathlib import Path

from .test_imports import LAYERS, ROOT

GUIDE = ROOT.joinpath("docs", "architecture.md").read_text(encoding="utf-8")


def exists(name: str) -> bool:
    tops = (ROOT, ROOT / "vembed_fs2")
    return any(Path(top, part).exists() for top in tops for part in (name, name.replace("<family>", "bert")))


def test_every_file_that_is_named_exists() -> None:
    names = set(re.findall(r"`([\w<>/]+(?:/|\.py))`", GUIDE))
    assert len(names) > 40
    assert {name for name in names if not exists(name)} == set()


def test_layers_are_listed_from_the_top_to_the_bottom() -> None:
    table = GUIDE[: GUIDE.index("## From a row")]
    positions = [table.index(f"`{names[0]}") for names in LAYERS]
    assert positions == sorted(positions)

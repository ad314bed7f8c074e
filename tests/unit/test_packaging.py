"""What gets installed."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_installed() -> None:
    text = ROOT.joinpath("pyproject.toml").read_text(encoding="utf-8")
    listed = re.findall(r'^    "(vembed_fs2[\w.]*)",$', text[text.index("packages = [") :], re.MULTILINE)
    folders = {
        f.parent.relative_to(ROOT)
        for top in ("vembed_fs2", "recipes", "assets")
        for f in ROOT.glob(f"{top}/**/__init__.py")
    }
    names = {".".join(folder.parts) for folder in folders}
    assert set(listed) == {name if name.startswith("vembed_fs2") else f"vembed_fs2.{name}" for name in names}

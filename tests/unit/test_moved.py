"""Names that have moved are still found where plugins look for them."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vembed_fs2"


def moved_names() -> list[tuple[str, str, str]]:
    """The old module, the name and the new module of everything that has moved."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if "forward_names(\n" not in text:
            continue
        module = ".".join(("vembed_fs2", *file.relative_to(PACKAGE).with_suffix("").parts))
        homes = next(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Dict))
        found += [(module, name, home) for name, home in ast.literal_eval(homes).items()]
    return found


@pytest.mark.parametrize(("old", "name", "new"), moved_names())
def test_a_moved_name_is_found_with_a_warning(old: str, name: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"has moved to `{new}`"):
        value = getattr(import_module(old), name)
    assert value is getattr(import_module(new), name)


def test_what_a_module_never_had_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        import_module("vembed_fs2.models.head").nothing  # noqa: B018

from __future__ import annotations

from pathlib import Path

import pytest

from vembed_fs2.commands.models_table import create_tables, replace_tables

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
    ("guide", "tables"), [("models.md", {"families", "cards"}), ("choosing-a-model.md", {"choices"})]
)
def test_the_tables_of_the_guide_are_current(guide: str, tables: set[str]) -> None:
    text = DOCS.joinpath(guide).read_text(encoding="utf-8")
    made = create_tables(text)
    assert made.keys() == tables
    assert replace_tables(text, made) == text, f"run `python -m vembed_fs2.commands.models_table docs/{guide}`"


def test_only_what_is_between_the_markers_is_replaced() -> None:
    text = "a\n<!-- cards: by hand -->\nold\n<!-- end of cards -->\nb\n<!-- other -->\nc\n<!-- end of other -->\n"
    assert replace_tables(text, {"cards": r"| \1 |" + "\n"}) == text.replace("old", r"| \1 |")


def test_a_guide_without_a_place_for_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for the table of families"):
        replace_tables("<!-- cards -->\n<!-- end of cards -->\n", {"families": ""})

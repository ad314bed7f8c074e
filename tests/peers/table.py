"""Makes the table of docs/compatibility.md of what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .compare import Cell, Results, Side

BEGIN: Final = "<!-- table: make test-peers -->"
END: Final = "<!-- end -->"

_COLUMNS: Final = (
    ("transformers 4.57", "hf", "present"),
    ("transformers 5", "hf", "newest"),
    ("sentence-transformers 5", "sentence-transformers", "present"),
    ("sentence-transformers 6", "sentence-transformers", "newest"),
)

_SIDES: Final[tuple[Side, ...]] = ("read", "written")


def make_table(results: Results) -> str:
    """One row per family: whether we read what a version writes, and it reads what we write."""
    head = [f"{name}, {side}" for name, _, _ in _COLUMNS for side in _SIDES]
    lines = [f"| family | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for family in dict.fromkeys(cell.family for cell in (*results.differences, *results.errors)):
        cells = [Cell(family, layout, peer, side) for _, layout, peer in _COLUMNS for side in _SIDES]
        lines.append(f"| {family} | {' | '.join(_describe(results, cell) for cell in cells)} |")
    return "\n".join(lines)


def _describe(results: Results, cell: Cell) -> str:
    if cell not in results.differences and cell not in results.errors:
        return "–"
    return "yes" if results.is_equal(cell) else "**no**"


def put_table(table: str, page: Path) -> None:
    """Put the table into a page, between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")

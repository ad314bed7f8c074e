"""Results as a table and as JSON; two of them as before and after."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from vembed_fs2.files import write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Results: TypeAlias = Mapping[str, float]
"""Values by the name of the metric."""


def results_table(columns: Mapping[str, Results], *, title: str | None = None) -> Table:
    """Return a table with a row per metric and a column per set of results, by the column's name.

    With two sets, a last column holds the second minus the first. A metric that
    a set lacks has an empty cell.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Text, because a string with brackets would be read as markup.
    table = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric")

    for name in columns:
        table.add_column(Text(name), justify="right")

    compared = tuple(columns.values()) if len(columns) == 2 else None
    if compared:
        table.add_column("difference", justify="right")

    for metric in dict.fromkeys(m for results in columns.values() for m in results):
        cells = [_cell(metric, results.get(metric)) for results in columns.values()]
        if compared:
            cells.append(_difference(metric, compared[0].get(metric), compared[1].get(metric)))
        table.add_row(Text(metric), *cells)

    return table


def print_results(columns: Mapping[str, Results], *, title: str | None = None, console: Console | None = None) -> None:
    """Print :func:`results_table`; colours and lines only where the output is a terminal that has them."""
    from rich.console import Console

    (console or Console()).print(results_table(columns, title=title))


def format_results(columns: Mapping[str, Results], *, title: str | None = None) -> str:
    """Return :func:`results_table` as plain text, for logs."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, color_system=None, force_terminal=False)
    print_results(columns, title=title, console=console)
    file = console.file
    assert isinstance(file, io.StringIO)

    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()).strip("\n")


def write_results(file: Path, results: Results | Mapping[str, Results], **about: object) -> None:
    """Write results as JSON, atomically: ``{"model": ..., "metrics": {...}}``.

    :param about: What the results are of: model, data, settings; each a key of the JSON object.
    """
    write_json(file, {**about, "metrics": results})


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if _is_count(metric) else f"{value:.4f}"


def _difference(metric: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    if _is_count(metric):
        return "" if before == after else f"{after - before:+.0f}"
    return f"{after - before:+.4f}"


def _is_count(metric: str) -> bool:
    return metric.rpartition("/")[2].startswith("num_")

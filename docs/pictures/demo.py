"""The picture of the README: retrieval before and after the text demo.

``python docs/pictures/demo.py docs/pictures/demo.json docs/pictures/demo.svg``
draws it from ``results.json`` of the demo's folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

METRICS = {"recall@1": "Recall@1", "recall@10": "Recall@10", "mrr": "MRR"}

WIDTH, ROW, TOP, LEFT, RIGHT = 720, 84, 64, 110, 70
"""In pixels: the picture, a metric, what is above and beside the bars."""

# Colours that can be told apart in print and on light and dark pages alike.
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 16px }
.value { font-variant-numeric: tabular-nums }
.before { fill: #9aa4af }
.after { fill: #2f81f7 }
.page { fill: #ffffff; stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .page { fill: #0d1117; stroke: #30363d }
}
"""


def draw(results: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Return an SVG with two bars for each metric.

    :param results: ``before`` and ``after``, each a metric's name and its value between 0 and 1.
    """
    height = TOP + ROW * len(METRICS) + 16
    label = "; ".join(
        f"{name} {results['before'][key]:.3f} before, {results['after'][key]:.3f} after"
        for key, name in METRICS.items()
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"'
        f' aria-label="{escape(label)}">',
        f"<style>{STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        f'<text class="title" x="24" y="38">{escape(title)}</text>',
    ]

    for i, (key, name) in enumerate(METRICS.items()):
        y = TOP + ROW * i
        lines.append(f'<text x="24" y="{y + 44}">{name}</text>')
        for j, side in enumerate(("before", "after")):
            value = results[side][key]
            length = (WIDTH - LEFT - RIGHT - 60) * value
            middle = y + 10 + 32 * j
            lines.append(
                f'<rect class="{side}" x="{LEFT}" y="{middle}" width="{length:.1f}" height="26" rx="3"/>'
                f'<text class="value" x="{LEFT + length + 8:.1f}" y="{middle + 18}">{value:.3f} {side}</text>'
            )

    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    results = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    title = "Search in Python's documentation, before and after one epoch of training"
    Path(sys.argv[2]).write_text(draw(results, title), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The families share what they have in common.

A pair of places is two files, or one file twice, that share six or more lines
in a row. Lines are the same if they have the same shape: names and literals
stand for each other, except those that a line declares (a field, a parameter, a
keyword argument, an entry of a table), because two lists of different things
are no copies. Imports, docstrings, comments and lines of a lone name or literal
do not count, and neither do named architectures, which stay plain.
"""

from __future__ import annotations

import ast
import io
import keyword
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Final

MODELS: Final = Path(__file__).parents[2] / "vembed_fs2/models"

RUN: Final = 6
"""How many lines in a row make a pair."""

MOST: Final = 31
"""
How many pairs there may be. Most are constructors that only keep their
arguments: each family has one, which looks like that of every other.
"""

_LAYOUT: Final = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def list_shapes(source: str) -> list[tuple[int, str]]:
    """Return the numbers and the shapes of the lines that count."""
    tree = ast.parse(source)
    passed_over = {line for node in ast.walk(tree) if _is_passed_over(node) for line in _lines_of(node)}
    declared = {place for node in ast.walk(tree) for place in _list_declared(node)}

    lines: dict[int, list[str]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in _LAYOUT or token.start[0] in passed_over:
            continue
        lines[token.start[0]].append(token.string if token.start in declared else _abstract(token))

    return [(number, " ".join(shape)) for number, shape in sorted(lines.items()) if not _is_lone(shape)]


def _abstract(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
        return "name"
    return "literal" if token.type in (tokenize.NUMBER, tokenize.STRING) else token.string


def _is_lone(shape: list[str]) -> bool:
    words = [word for word in shape if any(c.isalnum() for c in word)]
    return not words or (len(words) == 1 and not keyword.iskeyword(words[0]))


def _is_passed_over(node: ast.AST) -> bool:
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)

    return is_docstring or isinstance(node, (ast.Import, ast.ImportFrom))


def _lines_of(node: ast.AST) -> range:
    assert isinstance(node, ast.stmt)

    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _list_declared(node: ast.AST) -> Iterator[tuple[int, int]]:
    """Where names and literals stand that ``node`` declares."""
    if isinstance(node, (ast.keyword, ast.arg)):
        yield node.lineno, node.col_offset

    if isinstance(node, ast.ClassDef):
        yield from ((x.lineno, x.col_offset) for x in node.body if isinstance(x, ast.AnnAssign))

    if isinstance(node, ast.Dict):
        yield from ((x.lineno, x.col_offset) for x in ast.walk(node) if isinstance(x, ast.Constant))


def find_pairs(folder: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """Return the pairs of places in a folder: the files, and the lines at which the first shared run begins."""
    places: dict[tuple[str, ...], list[tuple[str, int, int]]] = defaultdict(list)
    for file in sorted(folder.rglob("*.py")):
        if file.name != "archs.py" or file.parent == folder:
            shapes = list_shapes(file.read_text(encoding="utf-8"))
            for idx in range(len(shapes) - RUN + 1):
                run = tuple(shape for _, shape in shapes[idx : idx + RUN])
                places[run].append((str(file.relative_to(folder)), idx, shapes[idx][0]))

    pairs: dict[tuple[str, str], tuple[int, int]] = {}
    for found in places.values():
        for (file, idx, line), (other_file, other_idx, other_line) in combinations(found, 2):
            if file != other_file or other_idx - idx >= RUN:
                pairs.setdefault((file, other_file), (line, other_line))

    return pairs


def test_families_share_what_they_have_in_common() -> None:
    pairs = find_pairs(MODELS)

    listed = [f"{a}:{i} ~ {b}:{j}" for (a, b), (i, j) in sorted(pairs.items())]
    assert len(pairs) <= MOST, "\n".join(listed)


def test_lines_of_one_shape_make_a_pair(tmp_path: Path) -> None:
    body = "\n".join(f"    x{i} = f(x{i}, {i})" for i in range(RUN))
    renamed = body.replace("x", "y").replace("f(", "g(")
    (tmp_path / "a.py").write_text(f"def first():\n{body}\n")
    (tmp_path / "b.py").write_text(f"import os\n\n\ndef second(a, b):\n    # Why.\n{renamed}\n")

    assert find_pairs(tmp_path) == {("a.py", "b.py"): (2, 6)}


def test_five_lines_are_no_pair(tmp_path: Path) -> None:
    body = "\n".join(f"x{i} = f({i})" for i in range(RUN - 1))
    (tmp_path / "a.py").write_text(body)
    (tmp_path / "b.py").write_text(body)

    assert not find_pairs(tmp_path)


def test_what_is_declared_is_compared_by_name(tmp_path: Path) -> None:
    for file, letter in (("a.py", "x"), ("b.py", "y"), ("c.py", "x")):
        fields = "\n".join(f"    {letter}{i}: int = {i}" for i in range(RUN))
        (tmp_path / file).write_text(f"class A:\n{fields}\n")

    assert list(find_pairs(tmp_path)) == [("a.py", "c.py")]


def test_named_architectures_do_not_count(tmp_path: Path) -> None:
    body = "\n".join(f"x{i} = f({i})" for i in range(RUN))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "archs.py").write_text(body)

    assert not find_pairs(tmp_path)

"""The rules of docs/architecture.md about who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS = (
    ("extension", "cli", "commands", "__main__", ""),
    ("demo",),
    ("recipes",),
    ("evaluation",),
    ("inference",),
    ("interop",),
    ("hub",),
    ("models",),
    ("processing",),
    ("formats",),
    ("data",),
    ("losses", "gradcache", "evaluation.metrics", "evaluation.search"),
    ("embedding",),
    ("distributed",),
    ("reachable", "errors", "files", "resolver", "_libsndfile", "_moved"),
)
"""An import goes down this list, or stays in its own entry."""

TORCH_ONLY = ("embedding", "losses", "gradcache", "evaluation.metrics", "evaluation.search", "distributed", "reachable")
"""These need torch, and nothing else that has to be installed."""

STANDARD = {"torch", "typing_extensions"}


def files() -> dict[str, Path]:
    """All modules of the package, by the name without ``vembed_fs2``."""
    found = {}
    for top in ("vembed_fs2", "recipes"):
        for file in sorted(ROOT.joinpath(top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts[1:] if top == "vembed_fs2" else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


FILES = files()


def imports(module: str) -> Iterator[tuple[str, int]]:
    """What a module imports, lazily or not, with the line: names of ours begin with ``vembed_fs2.``."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name.removeprefix("vembed_fs2.") in FILES else node.module), node.lineno


def ours(module: str) -> Iterator[tuple[str, int]]:
    for name, line in imports(module):
        if name == "vembed_fs2" or name.startswith("vembed_fs2."):
            yield name.removeprefix("vembed_fs2").removeprefix("."), line


def is_shim(module: str) -> bool:
    return "forward_names(\n" in FILES[module].read_text(encoding="utf-8")


def layer_of(module: str) -> int:
    """The index of the entry with the longest name that ``module`` is in."""
    fits = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or (name and module.startswith(f"{name}."))
    ]
    assert fits, f"`{module}` is in no layer"
    return max(fits)[1]


def test_no_import_goes_up() -> None:
    upward = [
        f"{FILES[module].relative_to(ROOT)}:{line} imports vembed_fs2.{name}"
        for module in FILES
        if module and not is_shim(module)
        for name, line in ours(module)
        if layer_of(name) < layer_of(module)
    ]
    assert upward == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {m: {n for n, _ in ours(m) if n in FILES and n != m} for m in FILES if m and not is_shim(m)}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module in done:
            return
        for name in sorted(graph.get(module, ())):
            visit(name, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_folders_do_not_import_each_other() -> None:
    """Of two folders, one is above the other, or they know nothing of each other."""
    edges = {
        (module.split(".")[0], name.split(".")[0])
        for module in FILES
        if module and not is_shim(module) and layer_of(module) != layer_of("losses")
        for name, _ in ours(module)
        if layer_of(name) != layer_of("losses")
    }
    assert [pair for pair in edges if pair[0] != pair[1] and pair[::-1] in edges] == []


def test_a_family_does_not_know_the_others() -> None:
    """Base modules know no family; a family knows relatives only if it says so here."""
    allowed = {("eva", "clip"), ("siglip", "clip"), ("composed", "vit"), ("composed", "bert"), ("composed", "clip")}
    families = {name.split(".")[1] for name in FILES if name.startswith("models.") and name.count(".") == 2} - {
        "common"
    }
    found = set()
    for module in FILES:
        parts = module.split(".")
        for name, line in ours(module):
            other = name.split(".")
            if parts[0] != "models" or other[0] != "models" or len(other) < 2 or other[1] not in families:
                continue
            own = parts[1] if len(parts) > 1 and parts[1] in families else None
            if own != other[1] and (own, other[1]) not in allowed:
                found.add(f"{FILES[module].relative_to(ROOT)}:{line} imports vembed_fs2.{name}")
    assert sorted(found) == []


@pytest.mark.parametrize("package", TORCH_ONLY)
def test_the_ground_floor_needs_torch_only(package: str) -> None:
    import sys

    modules = [m for m in FILES if m == package or m.startswith(f"{package}.")]
    assert modules
    for module in modules:
        for name, line in imports(module):
            top = name.split(".")[0]
            known = top in STANDARD or top in sys.stdlib_module_names or top == "vembed_fs2"
            assert known, f"{FILES[module].relative_to(ROOT)}:{line} imports {name}"

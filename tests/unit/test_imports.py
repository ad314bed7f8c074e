"""The rules of docs/architecture.md about who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import fairseq2
import pytest
from torch import Tensor
from torch.nn import Module

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
    ("reachable", "errors", "console", "dtypes", "fairseq2_seams", "files", "resolver", "_libsndfile", "_moved"),
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


def test_what_recipes_share_knows_no_recipe() -> None:
    recipes = {m for m in FILES if m.startswith("recipes.") and f"{m}.recipe" in FILES}
    assert "recipes.train" in recipes
    found = [
        f"{FILES[module].relative_to(ROOT)}:{line} imports vembed_fs2.{name}"
        for module in FILES
        if module.startswith("recipes.") and module.count(".") == 1
        for name, line in ours(module)
        if any(name == recipe or name.startswith(f"{recipe}.") for recipe in recipes - {module})
    ]
    assert found == []


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


SEAMS = "fairseq2_seams"
"""The one module that may reach into fairseq2."""


@cache
def private_members() -> frozenset[str]:
    """The private attributes and methods of all classes of fairseq2."""
    found: set[str] = set()
    for file in Path(fairseq2.__path__[0]).rglob("*.py"):
        for kls in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(kls, ast.ClassDef):
                found |= defined_by(kls)
    # Of torch's classes, and of named tuples, whose methods begin with `_` only to leave the names to the fields.
    of_others = {*dir(Module()), *dir(Tensor), *dir(NamedTuple("_Empty", []))}
    return frozenset(name for name in found if is_private(name) and name not in of_others)


def defined_by(kls: ast.ClassDef) -> set[str]:
    """The methods of a class, and what it assigns to ``self``."""
    names = {node.name for node in kls.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    for node in ast.walk(kls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
            names.add(node.attr)
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def names_as_texts(node: ast.Call | ast.Compare) -> list[str]:
    """The names in ``getattr(x, "_name")`` and its like, and in ``"_name" in x.__dict__``."""
    operands: list[ast.expr] = []
    if isinstance(node, ast.Compare):
        operands = [node.left]
    elif isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "delattr", "hasattr"):
        operands = node.args[1:2]
    return [o.value for o in operands if isinstance(o, ast.Constant) and isinstance(o.value, str)]


def find_reaches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Where a module reaches into fairseq2, and by which name."""
    classes: dict[str, type[object]] = {}
    ours = set().union(*(defined_by(kls) for kls in ast.walk(tree) if isinstance(kls, ast.ClassDef)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fairseq2":
            assert node.module is not None
            for alias in node.names:
                if is_private(alias.name) or "internal" in node.module.split("."):
                    yield node.lineno, alias.name
                elif isinstance(kls := getattr(import_module(node.module), alias.name, None), type):
                    classes[alias.asname or alias.name] = kls
        elif isinstance(node, ast.Attribute) and not is_own(node) and node.attr in private_members() - ours:
            yield node.lineno, node.attr
        elif isinstance(node, (ast.Call, ast.Compare)):
            yield from ((node.lineno, name) for name in names_as_texts(node) if name in private_members())

    for kls in ast.walk(tree):
        if not isinstance(kls, ast.ClassDef):
            continue
        names = [base.value if isinstance(base, ast.Subscript) else base for base in kls.bases]
        bases = [classes[name.id] for name in names if isinstance(name, ast.Name) and name.id in classes]
        if any("__final__" in vars(base) for base in bases):
            yield kls.lineno, f"{kls.name}, whose base is final"
        own = defined_by(kls)
        for node in ast.walk(kls) if bases else ():
            if isinstance(node, ast.Attribute) and is_own(node) and node.attr in private_members() - own:
                yield node.lineno, node.attr


def test_only_the_seams_reach_into_fairseq2() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for module, file in FILES.items()
        if module != SEAMS
        for line, name in find_reaches(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "from fairseq2.recipe.component import _ComponentEntry",
        "from fairseq2.recipe.internal.config import SomeName",
        "def f(trainer): return trainer._lapse_watch",
        "def f(trainer): return getattr(trainer, '_max_num_steps')",
        "def f(trainer): trainer._save_checkpoint = None",
        "from fairseq2.nn import BatchLayout\nclass A(BatchLayout): pass",
        "from fairseq2.nn import PositionEncoder\nclass A(PositionEncoder):\n    def f(self): return self._lapse_watch",
    ],
)
def test_a_reach_into_fairseq2_is_found(code: str) -> None:
    assert len(list(find_reaches(ast.parse(code)))) == 1

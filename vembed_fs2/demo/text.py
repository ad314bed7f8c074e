"""Pairs for the text demo: what a docstring promises, and what it goes on to explain.

A row's query is the first paragraph of a docstring, its positive the rest. The
docstrings come from the standard library, numpy and torch as they are
installed, so the demo downloads nothing.
"""

from __future__ import annotations

import ast
import math
import os
import random
import re
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import cleandoc
from pathlib import Path
from typing import Final

from vembed_fs2.demo import write_rows
from vembed_fs2.errors import DataError
from vembed_fs2.files import write_text

QUERY_LENGTH: Final = (20, 300)
"""The shortest and the longest query in characters; docstrings outside are left out."""

HELD_OUT_LENGTH: Final = 400
"""No query asks for a shorter document: "See also ..." does not say what it is about."""

DOCUMENT_LENGTH: Final = (100, 2000)
"""The shortest document, and where longer ones are cut, in characters."""

_SKIPPED: Final = frozenset(
    {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3", "distutils", "turtledemo", "ensurepip"}
)

# C functions have no source to read; these objects are imported by any training run anyway.
_NAMESPACES: Final = ("numpy", "numpy.ndarray", "torch", "torch.Tensor", "torch.nn.functional", "torch.linalg")

_SIGNATURE: Final = re.compile(r"[\w.]+\(.*\)(\s*->.*)?", re.DOTALL)


@dataclass(frozen=True)
class TextPairs:
    """The files of the text demo."""

    train: Path
    """JSONL rows of ``query`` and ``positive``: what to train on."""

    queries: Path
    """JSONL rows of ``_id`` and ``text``: the held-out queries."""

    corpus: Path
    """JSONL rows of ``_id`` and ``text``: all documents, also the training rows'."""

    qrels: Path
    """Which document answers which held-out query (``query-id``, ``corpus-id``, ``score``)."""


def build_pairs() -> list[dict[str, str]]:
    """Return all usable pairs, ``{"query": ..., "positive": ...}``, in a fixed order.

    No two pairs have the same query or the same document, whatever the case and
    the punctuation, and no document contains its query.
    """
    pairs: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    for docstring in _docstrings():
        pair = split_docstring(docstring)
        if pair is None:
            continue

        query, document = (_normal(text) for text in pair)
        keys = {("query", query), ("document", document)}
        if query in document or keys & seen:
            continue

        seen |= keys
        pairs.append({"query": pair[0], "positive": pair[1]})

    return pairs


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """Return the first paragraph in one line and the rest, or ``None`` where either is of no use."""
    paragraphs = re.split(r"\n\s*\n", cleandoc(docstring).strip(), maxsplit=2)
    if _SIGNATURE.fullmatch(paragraphs[0]):
        paragraphs = paragraphs[1:]

    # Underlines of headings are not words.
    query = " ".join(re.sub(r"([=\-~*^#])\1{3,}", " ", "".join(paragraphs[:1])).split())
    document = "\n\n".join(paragraphs[1:]).strip()

    if not QUERY_LENGTH[0] <= len(query) <= QUERY_LENGTH[1] or len(_normal(query).split()) < 4:
        return None
    if len(document) < DOCUMENT_LENGTH[0]:
        return None

    return query, document[: DOCUMENT_LENGTH[1]]


def split_pairs(
    pairs: list[dict[str, str]], *, num_held_out: int = 500, num_train: int | None = None, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows to train on and the held-out rows.

    Rows with nearly the same document (see :func:`near_duplicates`) fall on the
    same side, so that nothing held out was seen in training. Held-out documents
    have at least ``HELD_OUT_LENGTH`` characters.

    :param num_train: keep only so many rows to train on; ``None`` keeps all.
    :raises DataError: there are not enough pairs.
    """
    groups = near_duplicates([pair["positive"] for pair in pairs])
    random.Random(seed).shuffle(groups)

    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for group in groups:
        fits = len(held_out) + len(group) <= num_held_out
        long = all(len(pairs[i]["positive"]) >= HELD_OUT_LENGTH for i in group)
        side = held_out if fits and long else train
        side.extend(pairs[i] for i in group)

    if len(held_out) < num_held_out or not train:
        raise DataError(f"{len(pairs)} pairs are too few to hold out {num_held_out} of them.")

    return train[:num_train], held_out


def write_pairs(out: Path, *, num_held_out: int = 500, num_train: int | None = None, seed: int = 0) -> TextPairs:
    """Build the pairs, split them, and write what the demo trains and evaluates on.

    The evaluation asks for every held-out query's own document among the
    documents of both sides.
    """
    train, held_out = split_pairs(build_pairs(), num_held_out=num_held_out, num_train=num_train, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    files = TextPairs(out / "train.jsonl", out / "queries.jsonl", out / "corpus.jsonl", out / "qrels.tsv")
    documents = [row["positive"] for row in (*held_out, *train)]
    write_rows(files.train, train)
    write_rows(files.queries, ({"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(held_out)))
    write_rows(files.corpus, ({"_id": f"d{i}", "text": text} for i, text in enumerate(documents)))
    judgements = "".join(f"q{i}\td{i}\t1\n" for i in range(len(held_out)))
    write_text(files.qrels, "query-id\tcorpus-id\tscore\n" + judgements)

    return files


def near_duplicates(texts: list[str], *, threshold: float = 0.8) -> list[list[int]]:
    """Group texts that share much of their wording; a text unlike all others is a group of its own.

    Two texts are near duplicates if the Jaccard similarity of their sets of
    three consecutive words is at least ``threshold``; groups are the connected
    components. Exact: of two such texts, ordered by how rare their word triples
    are, the first ``n - ceil(threshold * n) + 1`` of each must share one (prefix
    filtering, Chaudhuri et al., ICDE 2006).
    """
    shingles = [_shingles(text) for text in texts]

    frequency = Counter(s for group in shingles for s in group)
    group_of = list(range(len(texts)))
    index: dict[int, list[int]] = defaultdict(list)
    for i, own in enumerate(shingles):
        rarest = sorted(own, key=lambda s: (frequency[s], s))

        prefix = rarest[: len(own) - math.ceil(threshold * len(own)) + 1]
        for j in sorted({j for s in prefix for j in index[s]}):
            a, b = _root(group_of, i), _root(group_of, j)
            if a != b and len(own & shingles[j]) >= threshold * len(own | shingles[j]):
                group_of[max(a, b)] = min(a, b)

        for s in prefix:
            index[s].append(i)

    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(texts)):
        groups[_root(group_of, i)].append(i)

    return list(groups.values())


def _root(parents: list[int], i: int) -> int:
    while parents[i] != i:
        parents[i] = parents[parents[i]]
        i = parents[i]
    return i


def _shingles(text: str) -> set[int]:
    words = _normal(text).split()
    return {zlib.crc32(" ".join(words[i : i + 3]).encode()) for i in range(max(len(words) - 2, 1))}


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _docstrings() -> Iterator[str]:
    for root in _roots():
        for file in _source_files(root):
            yield from _docstrings_in(file)
    for name in _NAMESPACES:
        yield from _docstrings_of(name)


def _roots() -> Iterable[Path]:
    yield Path(sysconfig.get_paths()["stdlib"])

    for package in ("numpy", "torch"):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent


def _source_files(root: Path) -> Iterator[Path]:
    """Yield the sources of public modules; private packages document implementation details."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(f for f in subfolders if f not in _SKIPPED and (f[0] != "_" or f == "_core"))
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _docstrings_in(file: Path) -> Iterator[str]:
    # Parsed, not imported: importing a module runs it.
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # Some packages ship templates with the suffix of a source file.

    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring

        # Functions within functions are not an interface; statements hold no docstrings.
        if isinstance(node, (ast.Module, ast.ClassDef, ast.If, ast.Try)):
            nodes.extend(node.body)
        if isinstance(node, (ast.If, ast.Try)):
            nodes.extend(node.orelse)


def _docstrings_of(namespace: str) -> Iterator[str]:
    module, _, name = namespace.rpartition(".")
    try:
        found = import_module(namespace)
    except ImportError:
        found = getattr(import_module(module), name)

    for key, value in sorted(vars(found).items()):
        docstring = getattr(value, "__doc__", None)
        if not key.startswith("_") and isinstance(docstring, str) and callable(value):
            yield docstring

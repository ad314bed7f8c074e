"""Compares what other libraries make of texts and images with what we make of them."""

from __future__ import annotations

import os
import subprocess
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vembed_fs2 import Embedder
from vembed_fs2.embedding.head import HeadConfig
from vembed_fs2.models.family import head_of

from .cases import TEXTS, Case, Vectors, list_cases, load_images, load_vectors

TOLERANCE = 1e-5
"""Of float32 vectors whose values are about 1; larger ones in proportion."""

Side = Literal["read", "written"]


class Peer(NamedTuple):
    """An environment."""

    name: str
    python: Path


class Cell(NamedTuple):
    """A family, and who has written or read its folders."""

    family: str
    layout: str
    peer: str
    side: Side


@dataclass
class Results:
    """What was found."""

    differences: dict[Cell, list[float]] = field(default_factory=dict)
    """The largest difference between vectors, for each case that could be compared."""

    errors: dict[Cell, list[str]] = field(default_factory=dict)

    def add(self, cell: Cell, found: float | str) -> None:
        if isinstance(found, str):
            self.errors.setdefault(cell, []).append(found)
        else:
            self.differences.setdefault(cell, []).append(found)

    def is_equal(self, cell: Cell) -> bool:
        """Whether all cases are equal."""
        return cell not in self.errors and max(self.differences[cell], default=1.0) <= TOLERANCE


def compare(root: Path, peers: list[Peer]) -> Results:
    """Let each of ``peers`` write folders, read and export them, and let each read the exports."""
    results = Results()
    _run_all("write", root, peers)

    for case in list_cases():
        for peer in peers:
            cell = Cell(case.family, case.layout, peer.name, "read")
            results.add(cell, _read(case, root / peer.name / case.name))

    _run_all("read", root, peers)
    for case in list_cases():
        for writer in peers:
            folder = root / writer.name / case.name
            for reader in peers if folder.joinpath("export").is_dir() else ():
                cell = Cell(case.family, case.layout, reader.name, "written")
                results.add(cell, _check_export(case, folder, reader))

    return results


def _run_all(verb: str, root: Path, peers: list[Peer]) -> None:
    """Run the program in all environments at the same time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [peer.python, "-m", "tests.peers.program", verb, root, peer.name],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for peer in peers
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


def _read(case: Case, folder: Path) -> float | str:
    if (report := folder / "expected.txt").is_file():
        return f"{case.name} was not written: {report.read_text()}"

    try:
        embedder = Embedder.load(folder / "model")
        difference = _compare_with_ours(case, embedder, folder)
        if not (case.layout != "hf" and case.family.startswith("siglip")):
            embedder.save(folder / "export", case.layout)
    except Exception as ex:
        return f"{case.name}: {''.join(traceback.format_exception(ex)[-3:])}"
    return difference


def _compare_with_ours(case: Case, embedder: Embedder, folder: Path) -> float:
    expected = load_vectors(folder / "expected.npz")
    images = load_images(folder)
    if case.layout != "hf":
        ours = {
            "text": embedder.encode(list(TEXTS)),
            "query": embedder.encode_query(list(TEXTS)),
            "document": embedder.encode_document(list(TEXTS)),
        }
        if "image" in case.reads:
            ours["image"] = embedder.encode(images)
        return max(_difference(ours[name], expected[name]) for name in ours)

    inputs: dict[str, list[Any]] = {"text": list(TEXTS), "image": images}
    found = []
    for kind in sorted(case.reads):
        vectors = embedder.encode(inputs[kind], normalize_embeddings=False)
        for idx, vector in enumerate(vectors):
            found.append(_difference(vector, _pool(embedder, expected, f"{kind}/{idx}")))
    return max(found)


def _pool(embedder: Embedder, expected: Vectors, name: str) -> Any:
    """What a library makes of a text or an image, pooled as our head pools it."""
    head = head_of(embedder.source.config)
    if head is None or head.poolings == ("pooler",):
        return expected[f"{name}/features"]

    states = expected[f"{name}/states"]
    if states.ndim == 3:  # A map of channels.
        states = states.reshape(len(states), -1).T
    return np.concatenate([_pool_one(embedder, head, states, pooling, name) for pooling in head.poolings])


def _pool_one(embedder: Embedder, head: HeadConfig, states: Any, pooling: str, name: str) -> Any:
    match pooling:
        case "cls":
            return states[0]
        case "last":
            return states[-1]
        case "mean":
            prefix = getattr(embedder.model, "num_prefix_tokens", 1) if name.startswith("image") else 0
            return states[prefix:].mean(0)
    raise AssertionError(f"{head} has a pooling that is not compared.")


def _check_export(case: Case, folder: Path, reader: Peer) -> float | str:
    if (report := folder / f"{reader.name}.txt").is_file():
        return f"{case.name} was not read: {report.read_text()}"

    expected, found = load_vectors(folder / "expected.npz"), load_vectors(folder / f"{reader.name}.npz")
    if missing := sorted(expected.keys() ^ found.keys()):
        return f"{case.name}: {missing}"
    return max(_difference(found[name], expected[name]) for name in expected)


def _difference(a: Any, b: Any) -> float:
    if a.shape != b.shape:
        return float("inf")
    scale = max(1.0, float(np.abs(b).max(initial=0.0)))
    return float(np.abs(a - b).max(initial=0.0)) / scale

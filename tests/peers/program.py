"""What runs in the environment of another library: it writes folders, or reads those that we wrote.

Usage: python -m tests.peers.program write|read ROOT NAME

``ROOT`` holds a folder of cases for each library that writes, by its name. A case is a
folder with what is encoded, ``model`` and ``expected.npz``; and, if we have exported it,
``export``, beside which the reader ``NAME`` puts ``NAME.npz``. Instead of what failed
there is a ``.txt`` file with the reason.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from .cases import Case, list_cases, load_images, make_images, run_model, save_images, save_vectors, write_model
from .sentences import run_sentence_model, write_sentence_model


def write_cases(root: Path, name: str) -> None:
    for case in list_cases():
        folder = root / name / case.name
        folder.mkdir(parents=True)
        save_images(make_images(case.rng), folder)
        _attempt(lambda case=case, folder=folder: _write(case, folder), folder / "expected.txt")


def _write(case: Case, folder: Path) -> None:
    if case.layout == "hf":
        write_model(case, folder / "model")
    else:
        write_model(case, folder / "backbone")
        write_sentence_model(case, folder / "backbone", folder / "model")
    _run(case, folder / "model", folder, folder / "expected.npz")


def read_exports(root: Path, name: str) -> None:
    for case in list_cases():
        for folder in sorted(path / case.name for path in root.iterdir()):
            export = folder / "export"
            if export.is_dir():
                _attempt(
                    lambda case=case, folder=folder: _run(case, folder / "export", folder, folder / f"{name}.npz"),
                    folder / f"{name}.txt",
                )


def _run(case: Case, model: Path, folder: Path, file: Path) -> None:
    run = run_model if case.layout == "hf" else run_sentence_model
    save_vectors(run(case, model, load_images(folder)), file)


def _attempt(function: Callable[[], None], report: Path) -> None:
    """Go on with the next case if one fails, whatever a library raises."""
    try:
        function()
    except Exception as ex:
        report.write_text(f"{type(ex).__name__}: {ex}")
        if "VERBOSE" in os.environ:
            traceback.print_exc()


def main() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    verb, root, name = sys.argv[1:]
    (write_cases if verb == "write" else read_exports)(Path(root), name)


if __name__ == "__main__":
    main()

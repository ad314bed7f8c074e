"""Makes libsndfile available to fairseq2's binary wheel without root rights."""

from __future__ import annotations

import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path


def preload_libsndfile() -> None:
    """Load the libsndfile that the ``soundfile`` wheel bundles.

    ``fairseq2n`` links to ``libsndfile.so.1``. The bundled library carries that
    name, so loading it first satisfies the link. If the wheel bundles none
    (a source install), the system's library is used and nothing is done here.
    """
    spec = find_spec("_soundfile_data")
    if spec is None or not spec.submodule_search_locations:
        return

    suffix = "dylib" if sys.platform == "darwin" else "so"
    for folder in spec.submodule_search_locations:
        for library in sorted(Path(folder).glob(f"libsndfile*.{suffix}")):
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue  # Built for another machine; try the next one.
            return

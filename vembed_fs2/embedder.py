"""Moved; what plugins import from here can be imported for one version more."""

from __future__ import annotations

from vembed_fs2._moved import forward_names

__getattr__ = forward_names(
    __name__,
    {
        "Embedder": "vembed_fs2.inference.embedder",
        "load_processor": "vembed_fs2.hub.load",
        "quantize": "vembed_fs2.inference.vectors",
    },
)

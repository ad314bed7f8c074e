"""Moved; what plugins import from here can be imported for one version more."""

from __future__ import annotations

from vembed_fs2._moved import forward_names

__getattr__ = forward_names(
    __name__,
    {
        "TextHead": "vembed_fs2.embedding.head",
        "head_output_dim": "vembed_fs2.embedding.head",
        "validate_head": "vembed_fs2.embedding.head",
        "pool": "vembed_fs2.embedding.head",
    },
)

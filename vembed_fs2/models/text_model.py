"""Moved; what plugins import from here can be imported for one version more."""

from __future__ import annotations

from vembed_fs2._moved import forward_names

__getattr__ = forward_names(
    __name__,
    {
        "TextBackboneModel": "vembed_fs2.models.common.text_model",
    },
)

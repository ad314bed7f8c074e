"""Moved; what plugins import from here can be imported for one version more."""

from __future__ import annotations

from vembed_fs2._moved import forward_names

__getattr__ = forward_names(
    __name__,
    {
        "ModelSource": "vembed_fs2.hub.find",
        "find_model": "vembed_fs2.hub.find",
        "load_model": "vembed_fs2.hub.load",
        "load_source": "vembed_fs2.hub.load",
        "get_resolver": "vembed_fs2.resolver",
    },
)

"""Forwards names of modules that have moved, so that plugins go on working for one version."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def forward_names(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module whose names have moved.

    :param module: the module that they were in.
    :param homes: the module that each name is in now.
    """

    def forward(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")

        text = f"`{module}.{name}` has moved to `{homes[name]}`. It is found here for one version more."
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(import_module(homes[name]), name)

    return forward

"""The layouts of model folders. Each tells whether a folder has it, opens it, and may write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairseq2.runtime.dependency import DependencyContainer, DependencyLookup, DependencyResolver

from vembed_fs2.errors import VembedError, did_you_mean
from vembed_fs2.resolver import get_resolver


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of model folders."""

    name: str
    """What users call it: ``export --format NAME``."""

    detects: Callable[[Path], bool]
    """Whether a folder has this layout. Layouts that were registered later are asked first."""

    open: Callable[[Path], Any]
    """
    Opens such a folder: returns a :class:`vembed_fs2.formats.folder.ModelFolder`.

    :raises ModelLoadError: it is broken, or not supported.
    """

    write: Callable[[Any, Path], None] | None = None
    """
    Writes a loaded model (an ``Embedder``) to a new folder; ``None`` if the layout is only read.

    :raises VembedError: the layout cannot express the model; the message says why.
    """

    config_name: str = "config.json"
    """The file that only folders of this layout have."""

    weight_patterns: Sequence[str] = ()
    """What its weights are called on a hub, the preferred ones first, if they are not called as in transformers."""


def register_layout(container: DependencyContainer, layout: Layout) -> None:
    """Register a layout: of this package, or of a plugin."""
    container.register_instance(Layout, layout, key=layout.name)


def list_layouts(resolver: DependencyResolver | None = None) -> list[Layout]:
    """Return all layouts, those that were registered last first."""
    resolver = resolver or get_resolver()
    names = list(DependencyLookup(resolver, Layout).iter_keys())
    return [resolver.resolve(Layout, key=name) for name in reversed(names)]


def find_layout(path: Path) -> Layout | None:
    """Return the layout of a folder; ``None`` if there is no model."""
    return next((layout for layout in list_layouts() if layout.detects(path)), None)


def get_writer(name: str) -> Callable[[Any, Path], None]:
    """Return what writes a layout.

    :raises VembedError: no layout has that name.
    """
    writers = {layout.name: layout.write for layout in list_layouts() if layout.write is not None}
    if name not in writers:
        hint = did_you_mean(name, writers) or f" These can: {', '.join(sorted(writers))}."
        raise VembedError(f"'{name}' is not a layout that can be written.{hint}")
    return writers[name]

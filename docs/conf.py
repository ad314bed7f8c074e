"""The site: the guides of this folder, and the reference made from docstrings (``make docs``)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as version_of
from typing import Any

from docutils.nodes import Node
from sphinx.application import Sphinx

import vembed_fs2  # noqa: F401  # fairseq2 needs libsndfile, which this import loads.

project = "vembed_fs2"
version = release = version_of("vembed_fs2")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "vembed_fs2"

# The guides are read where the code is hosted as well, so they are plain Markdown, and link to headings.
myst_heading_anchors = 4

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True

# A name that leads nowhere is an error, see `resolve_reference`.
nitpicky = True


def resolve_reference(app: Sphinx, env: Any, node: Any, content: Node) -> Node | None:
    """Show names that have no page as they are: types of other projects, and our own private ones."""
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None

    if not target.startswith("vembed_fs2."):
        return content

    # A name in an annotation is there, or the module could not be imported. A name in a sentence may be wrong.
    return content if exists(target) else None


def exists(target: str) -> bool:
    """Whether a dotted name leads to a module, or to an attribute of one."""
    module, attributes = target, list[str]()
    while module:
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            attributes.insert(0, name)
            continue

        for name in attributes:
            found = getattr(found, name, None) or getattr(found, "__dataclass_fields__", {}).get(name)
        return found is not None

    return False


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve_reference)

"""fairseq2's dependency resolver."""

from __future__ import annotations

from fairseq2 import init_fairseq2
from fairseq2.error import InvalidOperationError
from fairseq2.runtime.dependency import DependencyResolver, get_dependency_resolver


def get_resolver() -> DependencyResolver:
    """Return fairseq2's resolver; initialize fairseq2 if nobody has."""
    try:
        return get_dependency_resolver()
    except InvalidOperationError:
        return init_fairseq2(no_progress=True)

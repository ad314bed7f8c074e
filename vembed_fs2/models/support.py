"""What a family can do, besides what fairseq2's own ``ModelFamily`` says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fairseq2.gang import get_current_gangs
from fairseq2.runtime.dependency import DependencyResolver, get_dependency_resolver

from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import ConfigError
from vembed_fs2.processing.processor import Processor

ProcessorLoader: TypeAlias = Callable[[EmbeddingModel, Path, "int | None"], Processor[Any]]
"""
Loads the processor of a model from a folder. The last argument overrides the longest text in tokens.

:raises ModelLoadError: a file is missing or broken.
"""


@dataclass(frozen=True)
class FamilySupport:
    """What a family of embedding models can do."""

    tensor_parallel: bool | Callable[[Any], bool] = False
    """Whether its models can be split over tensor parallel ranks; or which configurations' can."""

    packed: bool = False
    """Whether its models encode texts one after the other, without padding."""

    load_processor: ProcessorLoader | None = None
    """Loads the processor of its models; ``None`` if they encode texts and images apart, as most do."""

    def can_shard(self, config: Any) -> bool:
        """Whether the model of ``config`` can be split over tensor parallel ranks."""
        return self.tensor_parallel(config) if callable(self.tensor_parallel) else self.tensor_parallel

    def check_gangs(self, family: str, config: Any) -> None:
        """Check that the model can be created for the current gangs.

        :raises ConfigError: there are several tensor parallel ranks, and it cannot be split over them.
        """
        size = get_current_gangs().tp.size
        if size > 1 and not self.can_shard(config):
            which = "this" if callable(self.tensor_parallel) else "every"
            raise ConfigError(
                f"`gang.tensor_parallel_size` must be 1, but is {size} instead: "
                f"{which} configuration of {family} is without tensor parallelism."
            )


def get_family_support(family: str, resolver: DependencyResolver | None = None) -> FamilySupport:
    """Return what ``family`` can do; nothing, if it was not registered with :func:`~.family.register_family`."""
    resolver = resolver or get_dependency_resolver()
    return resolver.maybe_resolve(FamilySupport, key=family) or FamilySupport()

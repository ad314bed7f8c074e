"""What a family can do, besides what fairseq2's own ``ModelFamily`` says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq2.gang import get_current_gangs
from fairseq2.runtime.dependency import DependencyResolver, get_dependency_resolver

from vembed_fs2.errors import ConfigError


@dataclass(frozen=True)
class FamilySupport:
    """What a family of embedding models can do."""

    tensor_parallel: bool | Callable[[Any], bool] = False
    """Whether its models can be split over tensor parallel ranks; or which configurations' can."""

    packed: bool = False
    """Whether its models encode texts one after the other, without padding."""

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

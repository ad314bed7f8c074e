"""Registers named architectures, and what each says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, overload

from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer, DependencyResolver

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class ArchSummary:
    """What an architecture says of itself."""

    text: str
    """The first line of the docstring of its function; empty if there is none."""


class ArchRegistrar(Generic[ConfigT]):
    """Registers the architectures of a family as fairseq2's ``ConfigRegistrar`` does, with their docstrings.

    .. code:: python

        arch = ArchRegistrar(container, ClipConfig)

        @arch("vit_base_patch16")
        def vit_base_patch16() -> ClipConfig:
            \"\"\"ViT-B/16.\"\"\"
            return ClipConfig(...)
    """

    def __init__(self, container: DependencyContainer, config_kls: type[ConfigT]) -> None:
        """
        :param config_kls: the class of the family's configurations.
        """
        self._container = container
        self._config_kls = config_kls
        self._registrar = ConfigRegistrar(container, config_kls)

    @overload
    def __call__(
        self, name: str, *, advanced: Literal[False] = ...
    ) -> Callable[[Callable[[], ConfigT]], Callable[[], ConfigT]]: ...

    @overload
    def __call__(
        self, name: str, *, advanced: Literal[True]
    ) -> Callable[[Callable[[DependencyResolver], ConfigT]], Callable[[DependencyResolver], ConfigT]]: ...

    def __call__(self, name: str, *, advanced: bool = False) -> Callable[..., Any]:
        """Make the decorator of the function that returns the architecture's configuration.

        :param advanced: whether the function takes the resolver, to start from an architecture that is there already.
        """
        register: Callable[..., Any] = self._registrar(name, advanced=advanced)

        def decorate(provider: Callable[..., ConfigT]) -> Callable[..., ConfigT]:
            text = (inspect.getdoc(provider) or "").partition("\n")[0].replace("``", "")
            self._container.register_instance(ArchSummary, ArchSummary(text), key=(self._config_kls, name))
            register(provider)

            return provider

        return decorate


def get_arch_summary(config_kls: type, name: str, resolver: DependencyResolver) -> str:
    """Return the first line of an architecture's docstring; empty if it was registered by fairseq2's own means."""
    summary = resolver.maybe_resolve(ArchSummary, key=(config_kls, name))

    return summary.text if summary is not None else ""

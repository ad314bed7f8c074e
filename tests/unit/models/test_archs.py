"""Named architectures say what they are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from fairseq2.models import ModelFamily
from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer, DependencyResolver

from vembed_fs2.hub.catalog import arch_names, arch_summary, embedding_families
from vembed_fs2.models.archs import ArchRegistrar, get_arch_summary
from vembed_fs2.resolver import get_resolver


@dataclass
class Config:
    size: int = 1


def test_a_registered_architecture_has_its_docstring() -> None:
    container = DependencyContainer()
    arch = ArchRegistrar(container, Config)

    @arch("base")
    def base() -> Config:
        """The ``base``.

        More of it.
        """
        return Config(2)

    @arch("large", advanced=True)
    def large(resolver: DependencyResolver) -> Config:
        return Config(resolver.resolve(Config, key="base").size * 2)

    ConfigRegistrar(container, Config)("plain")(Config)

    assert base().size == 2
    assert container.resolve(Config, key="base").size == 2
    assert container.resolve(Config, key="large").size == 4
    assert get_arch_summary(Config, "base", container) == "The base."
    assert get_arch_summary(Config, "large", container) == ""
    assert get_arch_summary(Config, "plain", container) == ""


@pytest.mark.parametrize("name", embedding_families(get_resolver()))
def test_every_architecture_is_described(name: str) -> None:
    resolver = get_resolver()
    family = resolver.resolve(ModelFamily, key=name)

    for arch in arch_names(family, resolver):
        assert arch_summary(family, arch, resolver), arch

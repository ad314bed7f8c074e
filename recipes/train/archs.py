"""Finds the architecture of a model with new weights."""

from __future__ import annotations

from collections.abc import Iterable

from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import DependencyLookup

from vembed_fs2.errors import ConfigError, did_you_mean
from vembed_fs2.resolver import get_resolver


def find_arch_config(family_name: str, arch: str | None) -> object:
    """Return the configuration of an architecture, or the default one of a family.

    :raises ConfigError: there is no such family or architecture.
    """
    resolver = get_resolver()
    family = resolver.maybe_resolve(ModelFamily, key=family_name)
    if family is None:
        known = [str(k) for k in DependencyLookup(resolver, ModelFamily).iter_keys()]
        raise ConfigError(_not_known("model.family", family_name, known))

    if arch is None:
        return family.config_kls()

    config = family.maybe_get_arch_config(arch)
    if config is None:
        raise ConfigError(_not_known("model.arch", arch, family.get_archs()))

    return config


def _not_known(key: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    hint = did_you_mean(name, names) or f" Known: {', '.join(names)}."
    return f"`{key}` '{name}' is not known.{hint}"

"""What models there are and what they can do: families, architectures, cards. No weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from fairseq2.assets import AssetCard, AssetCardError, AssetStore
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import DependencyLookup, DependencyResolver

from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import VembedError, did_you_mean
from vembed_fs2.models.archs import get_arch_summary
from vembed_fs2.models.family import get_checkpoint_format
from vembed_fs2.models.support import FamilySupport, get_family_support


@dataclass(frozen=True)
class FamilyEntry:
    """A family of embedding models."""

    name: str
    reads: list[str]
    """The ``model_type`` values of the ``config.json`` that it reads."""

    modalities: list[str]
    """What a row may hold: ``text``, ``image``."""

    archs: list[str]
    cards: list[str]
    supports: dict[str, str]
    """See :func:`list_support`."""


@dataclass(frozen=True)
class ModelEntry:
    """A model of some configuration."""

    embedding_dim: int
    modalities: list[str]
    max_text_length: int | None
    tokens_per_image: int | None
    similarity: str
    unit_length: bool
    parameters: int
    parts: dict[str, int]
    """The parameters of each part of the model, such as its towers."""


def embedding_families(resolver: DependencyResolver) -> list[str]:
    """The names of all families of embedding models, of this package and of others."""
    return [str(name) for name in DependencyLookup(resolver, FamilySupport).iter_keys()]


def get_family(name: str, resolver: DependencyResolver) -> ModelFamily:
    """Return a family by its name.

    :raises VembedError: there is none.
    """
    known = embedding_families(resolver)
    if name not in known:
        hint = did_you_mean(name, known) or f" There are: {', '.join(known)}."
        raise VembedError(f"There is no family of embedding models named '{name}'.{hint}")
    return resolver.resolve(ModelFamily, key=name)


def describe_family(name: str, resolver: DependencyResolver) -> FamilyEntry:
    """Describe a family.

    :raises VembedError: there is none of that name.
    """
    family = get_family(name, resolver)
    checkpoint_format = get_checkpoint_format(name, resolver)

    return FamilyEntry(
        name,
        list(checkpoint_format.model_types) if checkpoint_format is not None else [],
        _family_modalities(family, resolver),
        arch_names(family, resolver),
        [card.name for card in family_cards(name, resolver)],
        list_support(family, resolver),
    )


def arch_names(family: ModelFamily, resolver: DependencyResolver) -> list[str]:
    """The named architectures of a family, in the order in which they were registered."""
    return [str(key) for key in DependencyLookup(resolver, family.config_kls).iter_keys()]


def arch_summary(family: ModelFamily, arch: str, resolver: DependencyResolver) -> str:
    """The first line of the docstring of an architecture's function; empty if there is none."""
    return get_arch_summary(family.config_kls, arch, resolver)


def family_cards(name: str, resolver: DependencyResolver) -> list[AssetCard]:
    """The cards of a family, by name."""
    store = resolver.resolve(AssetStore)
    cards = []
    for card_name in sorted({n.partition("@")[0] for n in store.asset_names}):
        try:
            card = store.maybe_retrieve_card(card_name)
        except AssetCardError:
            continue  # Another package's card that is broken; fairseq2 itself has one.

        field = None if card is None else card.maybe_get_field("model_family")
        if card is not None and field is not None and field.value == name:
            cards.append(card)

    return cards


def list_support(family: ModelFamily, resolver: DependencyResolver, config: Any = None) -> dict[str, str]:
    """Whether a family, or its model of ``config``, can be run in each of these ways: ``yes``, ``no`` or ``some``.

    ``tp`` is tensor parallelism, ``fsdp`` FSDP2, ``ac`` layerwise activation
    checkpointing, ``compile`` ``torch.compile``, ``packed`` texts without padding.
    """
    facts = get_family_support(family.name, resolver)
    shards: bool | None = facts.can_shard(config) if config is not None else None
    if shards is None and not callable(facts.tensor_parallel):
        shards = facts.tensor_parallel

    support = {
        "tp": shards,
        "fsdp": family.supports_fsdp,
        "ac": family.supports_layerwise_ac,
        "compile": family.supports_compilation,
        "packed": facts.packed,
    }
    return {name: "some" if value is None else "yes" if value else "no" for name, value in support.items()}


def describe_model(family: ModelFamily, config: object) -> ModelEntry:
    """Describe the model of ``config``. It has no memory for weights, if the family can create it so.

    :raises ConfigError: ``config`` is not valid.
    """
    gangs = create_fake_gangs(torch.device("cpu"))
    model = family.create_new_model(config, gangs, torch.float32, family.supports_meta, True)
    assert isinstance(model, EmbeddingModel)

    return ModelEntry(
        model.embedding_dim,
        _in_order(model.modalities),
        model.max_text_length if "text" in model.modalities else None,
        model.tokens_per_image if "image" in model.modalities else None,
        model.similarity,
        model.normalize,
        sum(p.numel() for p in model.parameters()),
        _parts(model),
    )


def _parts(model: EmbeddingModel) -> dict[str, int]:
    """The parameters of each part; of those that parts share, the first has them."""
    seen: set[int] = set()
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            part = name.partition(".")[0]
            parts[part] = parts.get(part, 0) + parameter.numel()

    return parts


def _family_modalities(family: ModelFamily, resolver: DependencyResolver) -> list[str]:
    known = getattr(family.kls, "modalities", None)
    if known is not None:
        return _in_order(known)

    found: set[str] = set()
    archs = arch_names(family, resolver)

    # Small models are created faster, and there is one of each kind.
    for arch in [a for a in archs if a.startswith("tiny")] or archs[:1]:
        found.update(describe_model(family, family.maybe_get_arch_config(arch)).modalities)

    return _in_order(found)


def _in_order(modalities: Iterable[str]) -> list[str]:
    return sorted(modalities, reverse=True)

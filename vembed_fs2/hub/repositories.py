"""Models by the names of their repositories on the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Final

from fairseq2.assets import AssetCard, AssetCardError, AssetStore
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.utils.uri import Uri

from vembed_fs2.errors import did_you_mean
from vembed_fs2.hub.catalog import embedding_families

_REPOSITORY: Final = re.compile(r"(hg:/{1,2})?(\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?)")

log = logging.getLogger("vembed_fs2")


def find_repository(name: str) -> str | None:
    """Return the repository, with its revision if any, that a user names: ``owner/name`` or ``hg://owner/name``.

    A name in a folder that exists is a path with a mistake: nobody else need know of it.
    """
    match = _REPOSITORY.fullmatch(name)
    if match is None or (match[1] is None and Path(name).parent.is_dir()):
        return None
    return match[2]


def list_repositories(resolver: DependencyResolver) -> dict[str, str]:
    """Return the repositories of all cards of embedding models, and a card of each."""
    families, store = set(embedding_families(resolver)), resolver.resolve(AssetStore)
    repositories: dict[str, str] = {}
    for name in sorted({n.partition("@")[0] for n in store.asset_names}):
        try:
            card = store.maybe_retrieve_card(name)
            if card is None or not card.has_field("model_family") or not card.has_field("checkpoint"):
                continue
            family, uri = card.field("model_family").as_(str), card.field("checkpoint").as_uri()
        except AssetCardError:
            continue  # Another package's card that is broken.

        # A card that changes what the repository says is not what its name stands for.
        if family in families and uri.scheme == "hg" and not _changes_model(card):
            repositories.setdefault(repository_of(uri), name)

    return repositories


def _changes_model(card: AssetCard) -> bool:
    """Whether a card changes what its repository says. That a model is normalised, modules of the repository say."""
    field = card.maybe_get_field("model_config_overrides")
    return field is not None and field.value not in ({}, {"head": {"normalize": True}})


def repository_of(uri: Uri) -> str:
    """Return ``owner/name`` of ``hg://owner/name``."""
    return str(uri).removeprefix("hg:").lstrip("/")


def find_card_name(name: str, repositories: Mapping[str, str]) -> str | None:
    """Return the card of the repository that is called ``name``, with its owner or without.

    :returns: ``None`` if there is none, or if several owners have a repository of that name.
    """
    wanted = name.casefold()
    found = {
        card
        for repository, card in repositories.items()
        if wanted in (repository.casefold(), repository.casefold().partition("/")[2])
    }
    return found.pop() if len(found) == 1 else None


def suggest(name: str, names: Iterable[str], repositories: Mapping[str, str]) -> str:
    """Return the end of a message about a name that is not known: what it may have meant, or "".

    :param names: the names of cards.
    """
    # With the owner, or without if the user gave none.
    shown = {
        repository if "/" in name else repository.partition("/")[2]: card for repository, card in repositories.items()
    }
    known = {n.removesuffix("@"): f"'{n.removesuffix('@')}'" for n in names}
    known |= {part: f"'{part}' (the card '{card}')" for part, card in shown.items()}

    return did_you_mean(name, known, most=2, form=known.__getitem__)


@cache
def log_once(message: str) -> None:
    """Log a message, unless it was logged before."""
    log.info(message)

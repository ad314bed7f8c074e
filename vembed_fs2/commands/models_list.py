"""``fairseq2 vembed models list``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from vembed_fs2.commands.models import add_json_argument, print_columns, print_json

if TYPE_CHECKING:
    from fairseq2.assets import AssetCard

    from vembed_fs2.hub.catalog import FamilyEntry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--family", metavar="FAMILY", help="only this one")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print families, and their cards."""
    from vembed_fs2.hub.catalog import describe_family, embedding_families, family_cards
    from vembed_fs2.resolver import get_resolver

    resolver = get_resolver()
    names = [args.family] if args.family else sorted(embedding_families(resolver))

    families = [describe_family(name, resolver) for name in names]
    if args.json:
        print_json([asdict(family) for family in families])
        return 0

    _print_families(families)
    _print_cards([card for family in families for card in family_cards(family.name, resolver)])
    return 0


def _print_families(families: list[FamilyEntry]) -> None:
    ways = list(families[0].supports)
    rows = [
        [
            f.name,
            f"{len(f.archs)}",
            f"{len(f.cards)}",
            ", ".join(f.modalities),
            *f.supports.values(),
            ", ".join(f.reads),
        ]
        for f in families
    ]
    print_columns(["family", "archs", "cards", "rows of", *ways, "reads model_type"], rows)


def _print_cards(cards: list[AssetCard]) -> None:
    rows = []
    for card in cards:
        fields = (card.maybe_get_field(name) for name in ("model_family", "model_arch", "checkpoint"))
        rows.append([card.name, *("" if field is None else field.as_(str) for field in fields)])

    if rows:
        print()
        print_columns(["card", "family", "arch", "checkpoint"], rows)

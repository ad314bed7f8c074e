"""``fairseq2 vembed models archs``."""

from __future__ import annotations

import argparse
from typing import Any

from vembed_fs2.commands.models import add_json_argument, print_columns, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("family", nargs="?", metavar="FAMILY", help="show only this family's architectures")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print architectures with their sizes."""
    from vembed_fs2.hub.catalog import embedding_families
    from vembed_fs2.resolver import get_resolver

    names = [args.family] if args.family else sorted(embedding_families(get_resolver()))

    entries = [entry for name in names for entry in _describe(name)]
    if args.json:
        print_json(entries)
        return 0

    rows = [
        [e["family"], e["arch"], f"{e['embedding_dim']:>9}", f"{e['parameters']:>14,}", e["summary"]] for e in entries
    ]
    print_columns(["family", "arch", "embedding", "    parameters", "what it is"], rows)
    return 0


def _describe(name: str) -> list[dict[str, Any]]:
    from vembed_fs2.hub.catalog import arch_names, arch_summary, describe_model, get_family
    from vembed_fs2.resolver import get_resolver

    resolver = get_resolver()
    family = get_family(name, resolver)
    entries = []
    for arch in arch_names(family, resolver):
        model = describe_model(family, family.maybe_get_arch_config(arch))
        entries.append(
            {
                "family": name,
                "arch": arch,
                "summary": arch_summary(family, arch, resolver),
                "embedding_dim": model.embedding_dim,
                "parameters": model.parameters,
            }
        )

    return entries

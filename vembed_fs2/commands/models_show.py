"""``fairseq2 vembed models show``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vembed_fs2.commands.arguments import add_trust_argument
from vembed_fs2.commands.models import add_json_argument, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder, run, card or repository of the Hugging Face hub")
    add_json_argument(parser)
    add_trust_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Print what a model is, without loading it."""
    content = _describe(args.model, args.trust_remote_code)
    if args.json:
        print_json(content)
    else:
        _print(content)
    return 0


def _describe(name: str, trust_remote_code: bool) -> dict[str, Any]:
    from fairseq2.utils.structured import StandardValueConverter

    from vembed_fs2.hub.catalog import describe_model, get_family, list_support
    from vembed_fs2.hub.find import find_model
    from vembed_fs2.resolver import get_resolver

    resolver = get_resolver()
    source = find_model(name, resolver, trust_remote_code=trust_remote_code)
    family = get_family(source.family, resolver)

    content: dict[str, Any] = {"name": source.name, "family": source.family}
    if not isinstance(source.weights, Path):
        for key in ("model_arch", "checkpoint"):
            field = source.weights.maybe_get_field(key)
            content[key.removeprefix("model_")] = None if field is None else field.as_(str)

    content |= asdict(describe_model(family, source.config))
    content["supports"] = list_support(family, resolver, source.config)
    content["config"] = StandardValueConverter().unstructure(source.config)

    return content


def _print(content: Mapping[str, Any]) -> None:
    lines = {key: content[key] for key in ("name", "family", "arch", "checkpoint") if content.get(key) is not None}
    unit = ", unit length" if content["unit_length"] else ""

    lines["embedding"] = f"{content['embedding_dim']} dimensions{unit}, compared by {content['similarity']}"
    if "text" in content["modalities"]:
        limit = content["max_text_length"]
        lines["texts"] = "of any length" if limit is None else f"up to {limit} tokens"

    if "image" in content["modalities"]:
        lines["images"] = f"{content['tokens_per_image']} tokens each"

    lines["supports"] = ", ".join(f"{name} {answer}" for name, answer in content["supports"].items())
    for key, value in lines.items():
        print(f"{key:<12}{value}")

    _print_tree("parameters", f"{content['parameters']:,}", {k: f"{v:,}" for k, v in content["parts"].items()})
    _print_tree("config", "", content["config"])


def _print_tree(key: str, value: str, children: Mapping[str, Any], indent: int = 0) -> None:
    print(f"{' ' * indent}{key:<12}{value}".rstrip())

    for name, child in children.items():
        if isinstance(child, Mapping):
            _print_tree(name, "", child, indent + 2)
        else:
            print(f"{' ' * (indent + 2)}{name}: {child}")

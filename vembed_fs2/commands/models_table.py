"""The tables of models in the guides: ``python -m vembed_fs2.commands.models_table GUIDE...`` writes them anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from fairseq2.models import ModelFamily
from ruamel.yaml import YAML

from vembed_fs2.files import write_text
from vembed_fs2.hub.catalog import ModelEntry, describe_family, describe_model, embedding_families
from vembed_fs2.hub.find import find_model
from vembed_fs2.resolver import get_resolver

CHOICES: Final = (
    "sentence_transformers_all_minilm_l6_v2",
    "baai_bge_small_en_v15",
    "baai_bge_base_en_v15",
    "nomic_modernbert_embed_base",
    "alibaba_gte_modernbert_base",
    "sentence_transformers_all_mpnet_base_v2",
    "intfloat_multilingual_e5_small",
    "intfloat_multilingual_e5_large_instruct",
    "baai_bge_m3",
    "openai_clip_vit_base_patch32",
    "laion_clip_vit_large_patch14_datacomp_xl",
    "google_siglip2_base_patch16_224",
    "google_siglip2_so400m_patch16_naflex",
    "facebook_dinov2_small",
    "facebook_dinov3_vitb16_pretrain_lvd1689m",
)
"""The cards that ``docs/choosing-a-model.md`` compares: those that most people should look at first."""


def create_tables(text: str) -> dict[str, str]:
    """The tables that a guide has a place for, as Markdown."""
    tables = {"families": _family_table, "cards": _card_table, "choices": _choice_table}
    return {name: create() for name, create in tables.items() if f"<!-- {name}:" in text}


def replace_tables(text: str, tables: Mapping[str, str]) -> str:
    """Put each table between its two markers, ``<!-- NAME ... -->`` and ``<!-- end of NAME -->``.

    :raises ValueError: there are no such markers.
    """
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name}\b[^\n]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"There is no place for the table of {name}.")
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}{found[2]}", text)  # type: ignore[misc]
    return text


def _family_table() -> str:
    resolver = get_resolver()
    rows = []
    for name in sorted(embedding_families(resolver)):
        # Families of other packages are documented there.
        if not resolver.resolve(ModelFamily, key=name).kls.__module__.startswith("vembed_fs2."):
            continue

        family = describe_family(name, resolver)
        reads = ", ".join(f"`{model_type}`" for model_type in family.reads)
        modalities = ("yes" if m in family.modalities else "" for m in ("text", "image"))
        supports = ("" if answer == "no" else answer for answer in family.supports.values())
        rows.append([f"`{name}`", reads, *modalities, *supports])

    ways = ["tensor parallel", "FSDP2", "activation checkpointing", "compile", "unpadded"]
    return _markdown(["family", "reads `model_type`", "texts", "images", *ways], rows)


def _card_table() -> str:
    rows = []
    known: dict[tuple[str, str], ModelEntry] = {}
    for file in sorted(resources.files("vembed_fs2.assets.cards").iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".yaml"):
            continue

        for card in YAML(typ="safe", pure=True).load_all(file.read_text(encoding="utf-8")):
            model = _describe_card(card["name"], known)
            repository = card["checkpoint"].removeprefix("hg://")
            size = f"{model.parameters / 1e6:,.1f} M"
            rows.append([f"`{card['name']}`", f"`{card['model_arch']}`", repository, f"{model.embedding_dim}", size])

    return _markdown(["card", "architecture", "repository", "embedding", "parameters"], rows, numbers=2)


def _choice_table() -> str:
    rows = []
    for name in CHOICES:
        model = _describe_card(name, {})
        text = "" if model.max_text_length is None else f"{model.max_text_length:,}"
        image = "" if model.tokens_per_image is None else f"{model.tokens_per_image:,}"
        rows.append([f"`{name}`", text, image, f"{model.embedding_dim}", f"{model.parameters / 1e6:,.0f} M"])

    header = ["card", "longest text (tokens)", "tokens of an image", "embedding", "parameters"]
    return _markdown(header, rows, numbers=4)


def _describe_card(name: str, known: dict[tuple[str, str], ModelEntry]) -> ModelEntry:
    """
    :param known: what is known of configurations, which several cards may have.
    """
    source = find_model(name)
    key = (source.family, repr(source.config))
    if key not in known:
        known[key] = describe_model(get_resolver().resolve(ModelFamily, key=source.family), source.config)
    return known[key]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    """
    :param numbers: how many columns, the last ones, hold numbers.
    """
    rules = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rules)}|"]

    # Empty cells as people write them.
    lines += [f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    for file in map(Path, sys.argv[1:]):
        text = file.read_text(encoding="utf-8")
        write_text(file, replace_tables(text, create_tables(text)))


if __name__ == "__main__":
    main()

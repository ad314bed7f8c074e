"""Writes the model card of an exported folder: a README.md whose header the hub reads."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from fairseq2.assets import AssetCard, AssetStore
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vembed_fs2.files import read_json, write_text
from vembed_fs2.formats.open_clip import OPEN_CLIP_CONFIG
from vembed_fs2.hub.find import ModelSource
from vembed_fs2.interop import Exportable
from vembed_fs2.models.family import head_of
from vembed_fs2.resolver import get_resolver

CARD_FILE: Final = "README.md"


@dataclass(frozen=True)
class Section:
    """A part of a model card."""

    title: str
    """Its heading, as plain text."""

    body: str
    """Its Markdown; what comes from outside must be escaped already (see :func:`escape`)."""


def write_model_card(exported: Exportable, folder: Path, name: str, *, more: Sequence[Section] = ()) -> None:
    """Write the model card of a folder that is complete otherwise. A card that is there already stays.

    :param name: what the model is called in its heading.
    :param more: sections between the facts and how to use the model, for example its results.
    """
    file = folder / CARD_FILE
    if file.exists():
        return

    library = _find_library(folder)
    sections = [Section("Prompts", _prompts(exported)), *more, Section("Usage", _usage(exported, folder, library))]
    parts = [
        f"---\n{_header(exported, library)}---",
        f"# {escape(name)}",
        _introduction(exported),
        table(("", ""), _facts(exported).items()),
        *(f"## {escape(section.title)}\n\n{section.body}" for section in sections if section.body),
    ]
    write_text(file, "\n\n".join(parts) + "\n")


def escape(text: str) -> str:
    """Return a text as Markdown that shows it, on one line."""
    shown = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*{}\[\]#|~$]|__+|\b_|_\b", lambda found: "".join(f"&#{ord(c)};" for c in found.group()), shown)


def code(text: str) -> str:
    """Return a text as Markdown that shows it as code, with its spaces and line ends."""
    return f"<code>{escape(json.dumps(text, ensure_ascii=False).replace(' ', chr(0xA0)))}</code>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def find_base(source: ModelSource) -> str | None:
    """Return the repository on a hub that a model comes from, if that is known: ``publisher/name``."""
    if isinstance(source.weights, AssetCard):
        return _repository_of(source.weights)

    # Caches of hubs name the repository.
    for part in source.weights.parts:
        kind, *names = part.split("--")
        if kind == "models" and len(names) == 2:
            return "/".join(names)

    return _base_of_run(source.weights)


def _base_of_run(weights: Path) -> str | None:
    """The repository of the card that a run was started from; its folder says it."""
    if not weights.parent.name.startswith("step_") or len(weights.parents) < 3:
        return None

    try:
        config: Any = YAML(typ="safe").load(weights.parents[2] / "config.yaml")
        card_name = config["model"]["name"]
    except (OSError, YAMLError, LookupError, TypeError):
        return None

    if not isinstance(card_name, str):
        return None
    card = get_resolver().resolve(AssetStore).maybe_retrieve_card(card_name)
    return None if card is None else _repository_of(card)


def _repository_of(card: AssetCard) -> str | None:
    field = card.maybe_get_field("checkpoint")
    value = None if field is None else field.value
    if not isinstance(value, str) or not value.startswith("hg://"):
        return None
    return value.removeprefix("hg://").partition("@")[0].strip("/")


def _header(exported: Exportable, library: str) -> str:
    modalities, content = exported.model.modalities, {"library_name": library}
    if modalities == {"text"}:
        content["pipeline_tag"] = "sentence-similarity"
    else:
        content["pipeline_tag"] = "image-feature-extraction" if modalities == {"image"} else _ZERO_SHOT

    if (base := find_base(exported.source)) is not None:
        content["base_model"] = base

    tags = dict.fromkeys(
        (library, "feature-extraction", *(f"{m}-embeddings" for m in sorted(modalities)), "vembed_fs2")
    )
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump({**content, "tags": list(tags)}, stream)
    return stream.getvalue()


_ZERO_SHOT: Final = "zero-shot-image-classification"


def _introduction(exported: Exportable) -> str:
    model, base = exported.model, find_base(exported.source)
    what = " and ".join(f"{modality}s" for modality in sorted(model.modalities, reverse=True))

    vectors = f"vectors of {model.embedding_dim} values" if model.is_multi_vector else f"{model.embedding_dim} values"
    of = "several vectors for each input: " if model.is_multi_vector else ""
    origin = (
        ""
        if base is None
        else f" Its weights come from [{escape(base)}](https://huggingface.co/{quote(base)}), or start there."
    )
    return f"An embedding model: it turns {what} into {of}{vectors} that can be compared.{origin}"


def _facts(exported: Exportable) -> dict[str, str]:
    model, head = exported.model, head_of(exported.source.config)
    count = sum(parameter.numel() for parameter in model.parameters())

    facts = {
        "inputs": ", ".join(f"{modality}s" for modality in sorted(model.modalities, reverse=True)),
        "embedding size": str(exported.truncate_dim or model.embedding_dim),
        "unit length": "yes" if model.normalize else "no",
        "similarity": "MaxSim" if model.is_multi_vector else model.similarity,
        "parameters": f"{count:,}",
        "architecture": escape(exported.source.family.removeprefix("vembed_")),
    }
    if head is not None:
        facts["pooling"] = escape(" + ".join(head.poolings))
        if head.dense:
            facts["dense layers"] = " → ".join(str(dense.output_dim) for dense in head.dense)
    if "text" in model.modalities and exported.processor.settings.max_length is not None:
        facts["longest text"] = f"{exported.processor.settings.max_length} tokens"
    if exported.ranges is not None:
        facts["int8 ranges"] = "kept in this folder, for vembed_fs2"

    return facts


def _prompts(exported: Exportable) -> str:
    processor = exported.processor
    settings = processor.settings

    uses: Mapping[str | None, str] = {
        settings.default_prompt_name: "all inputs, if none is asked for",
        processor.role_prompt("document"): "documents",
        processor.role_prompt("query"): "queries",
    }
    rows = [(code(name), code(text), uses.get(name, "")) for name, text in settings.prompts.items() if text]
    return table(("name", "text before an input", "put before"), rows) if rows else ""


def _find_library(folder: Path) -> str:
    """The library that loads a folder as the model that it is."""
    if folder.joinpath("modules.json").is_file():
        return "sentence-transformers"
    if folder.joinpath(OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    return "transformers" if _is_of_transformers(folder) else "vembed_fs2"


def _is_of_transformers(folder: Path) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    file = folder / "config.json"
    return file.is_file() and read_json(file).get("model_type") in CONFIG_MAPPING_NAMES


def _usage(exported: Exportable, folder: Path, library: str) -> str:
    is_text, is_image = ("text" in exported.model.modalities), ("image" in exported.model.modalities)
    inputs = ", ".join(['"a text"'] * is_text + ['Path("image.png")'] * is_image)
    lines = ["from pathlib import Path\n"] if is_image else []
    lines += ["import vembed_fs2 as vf\n", 'embedder = vf.Embedder.load("path/to/this/folder")']
    lines += [f"embeddings = embedder.encode([{inputs}])"]
    blocks = [("vembed_fs2", lines)]

    if library == "sentence-transformers":
        lines = ["from sentence_transformers import SentenceTransformer\n"]
        lines += [
            'model = SentenceTransformer("path/to/this/folder")',
            'embeddings = model.encode(["a text", "another"])',
        ]
        blocks.append(("sentence-transformers", lines))

    if library == "open_clip":
        lines = ["import open_clip\n", 'place = "local-dir:path/to/this/folder"']
        lines += ["model, preprocess = open_clip.create_model_from_pretrained(place)"]
        lines += ["tokenizer = open_clip.get_tokenizer(place)", 'embeddings = model.encode_text(tokenizer(["a text"]))']
        blocks.append(("open_clip", lines))

    if _is_of_transformers(folder):
        blocks.append(("transformers", _transformers_lines(exported)))

    return "\n\n".join(f"With {name}:\n\n```python\n" + "\n".join(lines) + "\n```" for name, lines in blocks)


def _transformers_lines(exported: Exportable) -> list[str]:
    if "text" not in exported.model.modalities:
        return [
            "from PIL import Image",
            "from transformers import AutoImageProcessor, AutoModel\n",
            'processor = AutoImageProcessor.from_pretrained("path/to/this/folder")',
            'model = AutoModel.from_pretrained("path/to/this/folder")',
            'inputs = processor(Image.open("image.png"), return_tensors="pt")',
            "states = model(**inputs).last_hidden_state  # Pool them as said above.",
        ]

    length = exported.processor.settings.max_length
    cut = "" if length is None else f", truncation=True, max_length={length}"
    last = "states = model(**inputs).last_hidden_state  # Pool them as said above."
    if "image" in exported.model.modalities:
        last = "embeddings = model.get_text_features(**inputs)  # And `get_image_features` of pixels."

    return [
        "from transformers import AutoModel, AutoTokenizer\n",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        'model = AutoModel.from_pretrained("path/to/this/folder")',
        f'inputs = tokenizer(["a text"], padding=True{cut}, return_tensors="pt")',
        last,
    ]

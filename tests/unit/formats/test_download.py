"""What is fetched of a repository of the hub, and what when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.assets import AssetDownloadError
from fairseq2.utils.uri import Uri

from tests.unit.hub.test_find import MINILM, vectors
from vembed_fs2 import Embedder
from vembed_fs2.errors import VembedError
from vembed_fs2.formats.download import download_repository


class Hub:
    """Stands in for the hub's client: a repository in a local folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.folder, self.names = folder, names
        self.error: Exception | None = None
        monkeypatch.setattr("huggingface_hub.list_repo_files", self.list_repo_files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def list_repo_files(self, repository: str, *, revision: str | None = None) -> list[str]:
        if self.error is not None:
            raise self.error
        return self.names

    def snapshot_download(self, repository: str, **options: Any) -> str:
        self.asked.append({"repository": repository, **options})
        return str(self.folder)

    def fetched(self) -> set[str]:
        from huggingface_hub.utils import filter_repo_objects

        return set(filter_repo_objects(self.names, allow_patterns=self.asked[-1]["allow_patterns"]))


SMALL = {"config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "modules.json"}

SAFE = {"model.safetensors", "2_Dense/model.safetensors"}

PICKLED = {"pytorch_model.bin"}

OTHER = {"open_clip_pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "flax_model.msgpack", "README.md"}


@pytest.mark.parametrize(
    ("there", "options", "expected"),
    [
        (SAFE | PICKLED, {}, SMALL | SAFE),
        (PICKLED, {}, SMALL | PICKLED),
        (SAFE | PICKLED, {"weights": False}, SMALL),
        (SAFE | PICKLED, {"local_only": True}, SMALL | SAFE | PICKLED),
        ({"model-00001-of-00002.safetensors"}, {}, SMALL | {"model-00001-of-00002.safetensors"}),
    ],
)
def test_only_what_is_needed_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: set[str], options: dict[str, Any], expected: set[str]
) -> None:
    hub = Hub(monkeypatch, tmp_path, sorted(SMALL | OTHER | there))
    assert download_repository(Uri.maybe_parse("hg://owner/name@v2"), **options) == tmp_path  # type: ignore[arg-type]
    assert hub.fetched() == expected
    asked = hub.asked[0]
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v2")
    assert asked["local_files_only"] == options.get("local_only", False)


def test_without_a_connection_what_was_fetched_before_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(monkeypatch, tmp_path, sorted(SMALL | SAFE | PICKLED))
    hub.error = ConnectionError("offline")
    assert download_repository(Uri.maybe_parse("hg://owner/name")) == tmp_path  # type: ignore[arg-type]
    assert hub.fetched() == SMALL | SAFE | PICKLED
    assert hub.asked[0]["revision"] is None


def test_a_card_is_fetched_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, MINILM, [p.name for p in MINILM.iterdir()])
    assert torch.equal(vectors("sentence_transformers_all_minilm_l6_v2"), vectors(MINILM))
    assert {a["repository"] for a in hub.asked} == {"sentence-transformers/all-MiniLM-L6-v2"}


def test_a_failed_download_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Hub(monkeypatch, tmp_path, [])

    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(AssetDownloadError, match="no space left"):
        download_repository(Uri.maybe_parse("hg://owner/name"))  # type: ignore[arg-type]
    with pytest.raises(VembedError, match="no space left"):
        Embedder.load("baai_bge_small_en_v15", device="cpu")


OPEN_CLIP = {"open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"}


@pytest.mark.parametrize(
    ("there", "config", "expected"),
    [
        # timm's repositories hold its image tower, and a config.json of another kind.
        (OPEN_CLIP | {"model.safetensors"}, {"architecture": "vit"}, "open_clip_model.safetensors"),
        (OPEN_CLIP, None, "open_clip_model.safetensors"),
        (OPEN_CLIP - {"open_clip_model.safetensors"}, None, "open_clip_pytorch_model.bin"),
        # LAION's hold both layouts.
        (OPEN_CLIP | {"model.safetensors"}, {"model_type": "clip"}, "model.safetensors"),
        (OPEN_CLIP | PICKLED, {"model_type": "clip"}, "pytorch_model.bin"),
    ],
)
def test_of_several_layouts_the_weights_of_one_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: set[str], config: dict[str, str] | None, expected: str
) -> None:
    tmp_path.joinpath("open_clip_config.json").write_text("{}")
    if config is not None:
        tmp_path.joinpath("config.json").write_text(json.dumps(config))
    small = {"config.json", "tokenizer.json"}
    hub = Hub(monkeypatch, tmp_path, sorted(small | there))
    download_repository(Uri.maybe_parse("hg://owner/name"))  # type: ignore[arg-type]
    assert hub.fetched() == small | {"open_clip_config.json", expected}

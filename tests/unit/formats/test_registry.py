"""The registry of layouts, and a layout of somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq2.runtime.dependency import DependencyContainer
from safetensors.torch import save_file

from vembed_fs2.errors import VembedError
from vembed_fs2.formats import registry
from vembed_fs2.formats.folder import ModelFolder, OpenClipFolder
from vembed_fs2.formats.registry import Layout, get_writer, list_layouts, register_layout
from vembed_fs2.interop.layouts import register_layouts


class ToyFolder(ModelFolder):
    """A folder with the configuration under another name."""

    config_name = "toy.json"

    weight_names = ("toy.safetensors",)

    def text_options(self) -> dict[str, Any]:
        return {"max_length": self.config["longest"]}


WRITTEN: list[tuple[Any, Path]] = []

TOY = Layout(
    name="toy",
    detects=lambda path: path.joinpath("toy.json").is_file(),
    open=ToyFolder,
    write=lambda exported, folder: WRITTEN.append((exported, folder)),
)


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch) -> DependencyContainer:
    container = DependencyContainer()
    register_layouts(container)
    register_layout(container, TOY)
    register_layout(container, Layout(name="read_only", detects=lambda path: False, open=ToyFolder))
    monkeypatch.setattr(registry, "get_resolver", lambda: container)
    return container


def test_layouts_that_were_registered_later_are_asked_first(container: DependencyContainer) -> None:
    names = [layout.name for layout in list_layouts()]
    assert names == ["read_only", "toy", "open_clip", "sentence-transformers", "hf"]


def test_a_folder_of_another_layout_answers(container: DependencyContainer, tmp_path: Path) -> None:
    values = {"model_type": "bert", "longest": 7}
    tmp_path.joinpath("toy.json").write_text(json.dumps(values))
    tmp_path.joinpath("config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "toy.safetensors")
    folder = ModelFolder.open(tmp_path)
    assert isinstance(folder, ToyFolder)
    assert (folder.model_type, folder.text_options(), folder.keys()) == ("bert", {"max_length": 7}, {"a"})
    assert torch.equal(folder.tensors()["a"], torch.ones(2))


def test_export_lists_the_registry(container: DependencyContainer, tmp_path: Path) -> None:
    model = object()
    get_writer("toy")(model, tmp_path)
    assert [(model, tmp_path)] == WRITTEN
    with pytest.raises(VembedError, match=r"'csv' .* can: hf, open_clip, sentence-transformers, toy"):
        get_writer("csv")
    with pytest.raises(VembedError, match="'read_only' is not a layout that can be written"):
        get_writer("read_only")


def test_timms_own_config_is_none_of_transformers(container: DependencyContainer, tmp_path: Path) -> None:
    tmp_path.joinpath("open_clip_config.json").write_text("{}")
    assert isinstance(ModelFolder.open(tmp_path), OpenClipFolder)
    tmp_path.joinpath("config.json").write_text(json.dumps({"architecture": "vit"}))
    assert isinstance(ModelFolder.open(tmp_path), OpenClipFolder)
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": "clip"}))
    assert type(ModelFolder.open(tmp_path)) is ModelFolder

"""The layouts that come with the package, and what writes them."""

from __future__ import annotations

from pathlib import Path

from fairseq2.runtime.dependency import DependencyContainer

from vembed_fs2.formats.folder import ModelFolder, OpenClipFolder, is_open_clip_folder, open_sentence_transformers
from vembed_fs2.formats.open_clip import OPEN_CLIP_CONFIG
from vembed_fs2.formats.registry import Layout, register_layout
from vembed_fs2.interop import Exportable


def register_layouts(container: DependencyContainer) -> None:
    """Register the layouts of transformers, sentence-transformers and open_clip; the last one is asked first."""
    register_layout(
        container,
        Layout(
            name="hf", detects=lambda path: path.joinpath("config.json").is_file(), open=ModelFolder, write=_write_hf
        ),
    )
    register_layout(
        container,
        Layout(
            name="sentence-transformers",
            detects=lambda path: path.joinpath("modules.json").is_file(),
            open=open_sentence_transformers,
            write=_write_sentence_transformers,
            config_name="modules.json",
        ),
    )
    register_layout(
        container,
        Layout(
            name="open_clip",
            detects=is_open_clip_folder,
            open=OpenClipFolder,
            write=_write_open_clip,
            config_name=OPEN_CLIP_CONFIG,
            weight_patterns=("open_clip*model.safetensors", "open_clip*model.bin"),
        ),
    )


def _write_hf(exported: Exportable, folder: Path) -> None:
    from vembed_fs2.interop.transformers import save_hf

    save_hf(exported, folder)


def _write_sentence_transformers(exported: Exportable, folder: Path) -> None:
    from vembed_fs2.interop.sentence_transformers import save_sentence_transformers

    save_sentence_transformers(exported, folder)


def _write_open_clip(exported: Exportable, folder: Path) -> None:
    from vembed_fs2.interop.open_clip import save_open_clip

    save_open_clip(exported, folder)

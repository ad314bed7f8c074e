"""Writes the folder layout of transformers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from vembed_fs2.files import new_folder, write_json
from vembed_fs2.formats.folder import HEAD_FILE, IMAGE_HEAD_FILE
from vembed_fs2.interop import Exportable
from vembed_fs2.interop.backbone import write_backbone
from vembed_fs2.interop.finish import finish_folder
from vembed_fs2.interop.sentence_transformers import can_write_head, write_head
from vembed_fs2.models.family import head_of


def save_hf(exported: Exportable, folder: Path) -> None:
    """Write configuration, weights, tokenizer and image processor in transformers' layout.

    What follows a text backbone (pooling, dense layers) has no place in that
    layout and is written as sentence-transformers' modules beside it. Where they
    have no such pooling, it is written in a file of our own, and the tensors of
    dense layers with the backbone's tensors, among which transformers ignores them. So
    is what follows a model of images, or of texts and images.
    """
    head, has_modules = head_of(exported.source.config), can_write_head(exported)
    with new_folder(folder) as out:
        write_backbone(exported, out, with_dense=not has_modules)

        if has_modules:
            write_head(exported, out)
        elif head is not None:
            # A model that reads texts and images together has the head of its text decoder.
            is_image_head = "image" in exported.model.modalities and not exported.model.is_interleaved
            name = IMAGE_HEAD_FILE if is_image_head else HEAD_FILE
            write_json(out / name, asdict(head))

        finish_folder(exported, out, folder.name)

"""Writes the folder layout of transformers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from vembed_fs2.embedding.image_head import image_head_of
from vembed_fs2.files import new_folder, write_json
from vembed_fs2.formats.folder import HEAD_FILE, IMAGE_HEAD_FILE
from vembed_fs2.formats.sentence_transformers import has_pooling
from vembed_fs2.interop import Exportable
from vembed_fs2.interop.backbone import write_backbone
from vembed_fs2.interop.sentence_transformers import write_head
from vembed_fs2.models.family import head_of


def save_hf(exported: Exportable, folder: Path) -> None:
    """Write configuration, weights, tokenizer and image processor in transformers' layout.

    What follows a text backbone (pooling, dense layers) has no place in that
    layout and is written as sentence-transformers' modules beside it. Where they
    have no such pooling, it is written in a file of our own, and the tensors of
    dense layers with those of the backbone, where transformers ignores them. The
    pooling of an image backbone is written in a file of our own, too.
    """
    head = head_of(exported.source.config)
    with new_folder(folder) as out:
        write_backbone(exported, out, with_dense=head is not None and not has_pooling(head))
        if head is not None and has_pooling(head):
            write_head(exported, out)
        elif head is not None:
            write_json(out / HEAD_FILE, asdict(head))
        image_head = image_head_of(exported.source.config)
        if image_head is not None:
            write_json(out / IMAGE_HEAD_FILE, asdict(image_head))
        exported.processor.save(out)

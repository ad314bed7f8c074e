"""Writes models as folders that other libraries load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fairseq2.models.hg import save_hugging_face_model
from torch import Tensor

from vembed_fs2.errors import VembedError
from vembed_fs2.files import new_folder, write_json
from vembed_fs2.interop.sentence_transformers import has_pooling, write_modules
from vembed_fs2.models.clip import CLIP_FAMILY
from vembed_fs2.models.family import get_checkpoint_format, head_of
from vembed_fs2.models.folder import HEAD_FILE, IMAGE_HEAD_FILE
from vembed_fs2.models.vision import image_head_of

if TYPE_CHECKING:
    from vembed_fs2.embedder import Embedder


def save_hf(embedder: Embedder, folder: Path) -> None:
    """Write configuration, weights, tokenizer and image processor in transformers' layout.

    What follows a text backbone (pooling, dense layers) has no place in that
    layout and is written as sentence-transformers' modules beside it. Where they
    have no such pooling, it is written in a file of our own, and the tensors of
    dense layers with those of the backbone, where transformers ignores them. The
    pooling of an image backbone is written in a file of our own, too.
    """
    head = head_of(embedder.source.config)
    with new_folder(folder) as out:
        _write_backbone(embedder, out, with_dense=head is not None and not has_pooling(head))
        if head is not None and has_pooling(head):
            _write_head(embedder, out)
        elif head is not None:
            write_json(out / HEAD_FILE, asdict(head))
        image_head = image_head_of(embedder.source.config)
        if image_head is not None:
            write_json(out / IMAGE_HEAD_FILE, asdict(image_head))
        embedder.processor.save(out)


def save_sentence_transformers(embedder: Embedder, folder: Path) -> None:
    """Write a folder that sentence-transformers loads: the backbone and the modules after it."""
    with new_folder(folder) as out:
        _write_backbone(embedder, out)
        if head_of(embedder.source.config) is not None:
            _write_head(embedder, out)
        elif embedder.source.family == CLIP_FAMILY:
            _write_clip_modules(out)
        else:
            raise VembedError(f"{embedder.source.family} models cannot be written for sentence-transformers.")
        embedder.processor.save(out)


def _write_head(embedder: Embedder, folder: Path) -> None:
    settings = embedder.processor.settings
    head = head_of(embedder.source.config)
    assert head is not None
    write_modules(
        folder,
        head=head,
        max_length=settings.max_length,
        prompts=settings.prompts,
        default_prompt_name=settings.default_prompt_name,
        do_lower_case=settings.do_lower_case,
        dense_state={k: v.cpu() for k, v in embedder.model.state_dict().items() if k.startswith("head.dense.")},
        embedding_dim=embedder.embedding_dim,
    )


def _write_clip_modules(folder: Path) -> None:
    """Name sentence-transformers' own module for CLIP; it reads transformers' layout."""
    kinds = ("sentence_transformers.models.CLIPModel", "sentence_transformers.models.Normalize")
    paths = ("", "1_Normalize")
    folder.joinpath(paths[1]).mkdir()
    modules = [{"idx": i, "name": str(i), "path": p, "type": k} for i, (k, p) in enumerate(zip(kinds, paths))]
    write_json(folder / "modules.json", modules)


def _write_backbone(embedder: Embedder, folder: Path, *, with_dense: bool = False) -> None:
    source = embedder.source
    checkpoint_format = get_checkpoint_format(source.family)
    if checkpoint_format is None:
        raise VembedError(f"{source.family} models have no Hugging Face format.")
    state: dict[str, object] = {k: _plain(v) for k, v in embedder.model.state_dict().items()}
    state = {k: v for k, v in state.items() if with_dense or not k.startswith("head.dense.")}
    hf_state = checkpoint_format.to_hg_state_dict(state, source.config)
    save_hugging_face_model(folder, hf_state, checkpoint_format.to_hg_config(source.config))
    checkpoint_format.write_files(folder, source.config)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()

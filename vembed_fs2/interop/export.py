"""Writes models as folders that other libraries load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fairseq2.models.hg import save_hugging_face_model
from torch import Tensor

from vembed_fs2.errors import VembedError
from vembed_fs2.files import new_folder
from vembed_fs2.interop.sentence_transformers import write_modules
from vembed_fs2.models.family import get_checkpoint_format, head_of

if TYPE_CHECKING:
    from vembed_fs2.embedder import Embedder


def save_hf(embedder: Embedder, folder: Path) -> None:
    """Write configuration, weights, tokenizer and image processor in transformers' layout."""
    with new_folder(folder) as out:
        _write_backbone(embedder, out)
        embedder.processor.save(out)


def save_sentence_transformers(embedder: Embedder, folder: Path) -> None:
    """Write a folder that sentence-transformers loads: the backbone and the modules after it.

    Models without a head of their own (CLIP) are written in transformers'
    layout with a ``modules.json`` that names sentence-transformers' CLIP module.
    """
    with new_folder(folder) as out:
        _write_backbone(embedder, out)
        settings = embedder.processor.settings
        head = head_of(embedder.source.config)
        if head is None:
            raise VembedError(f"{embedder.source.family} models cannot be written for sentence-transformers.")
        state = embedder.model.state_dict()
        write_modules(
            out,
            head=head,
            max_length=settings.max_length,
            prompts=settings.prompts,
            default_prompt_name=settings.default_prompt_name,
            do_lower_case=settings.do_lower_case,
            similarity=embedder.model.similarity,
            dense_state={k: v.cpu() for k, v in state.items() if k.startswith("head.dense.")},
        )
        embedder.processor.save(out)


def _write_backbone(embedder: Embedder, folder: Path) -> None:
    source = embedder.source
    checkpoint_format = get_checkpoint_format(source.family)
    if checkpoint_format is None:
        raise VembedError(f"{source.family} models have no Hugging Face format.")
    state: dict[str, object] = {k: _plain(v) for k, v in embedder.model.state_dict().items()}
    state = {k: v for k, v in state.items() if not k.startswith("head.dense.")}
    hf_state = checkpoint_format.to_hg_state_dict(state, source.config)
    save_hugging_face_model(folder, hf_state, checkpoint_format.to_hg_config(source.config))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()

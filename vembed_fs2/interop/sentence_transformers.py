"""Writes the folder layout of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from vembed_fs2.embedding.head import DenseConfig, HeadConfig
from vembed_fs2.errors import ConfigError, VembedError
from vembed_fs2.files import new_folder, write_json
from vembed_fs2.formats.sentence_transformers import (
    ACTIVATIONS,
    EMPTY_PROMPTS,
    POOLING_KEYS,
    POOLINGS,
    TRANSFORMER_FILES,
    has_pooling,
)
from vembed_fs2.interop import Exportable
from vembed_fs2.interop.backbone import write_backbone
from vembed_fs2.interop.finish import finish_folder
from vembed_fs2.models.family import get_checkpoint_format, head_of


def write_modules(
    root: Path,
    *,
    head: HeadConfig,
    max_length: int | None,
    prompts: Mapping[str, str],
    default_prompt_name: str | None,
    do_lower_case: bool,
    dense_state: Mapping[str, Tensor],
    embedding_dim: int,
    truncate_dim: int | None = None,
) -> None:
    """Write the files that make a Hugging Face folder a sentence-transformers folder.

    The names are from before version 5.4, which every version reads, unless
    several poolings are in another order than those versions have.

    :param root: the folder with ``config.json``, the weights and the tokenizer.
    :param dense_state: the tensors ``head.dense.N.weight|bias``.
    :param embedding_dim: the size of an embedding, after all dense layers.
    :raises ConfigError: sentence-transformers has no such pooling.
    """
    if not has_pooling(head):
        raise ConfigError(
            f"`head.pooling` is '{head.pooling}', which sentence-transformers does not have. `--format hf` keeps it."
        )

    dim = (head.dense[0].input_dim if head.dense else embedding_dim) // len(head.poolings)
    folders = [("Transformer", ""), ("Pooling", "1_Pooling")]
    _write_pooling(root / "1_Pooling", head, dim)

    for idx, dense in enumerate(head.dense):
        folders.append(("Dense", f"{idx + 2}_Dense"))
        _write_dense(root / folders[-1][1], dense, dense_state, prefix=f"head.dense.{idx}.")

    if head.is_unit:
        folders.append(("Normalize", f"{len(folders)}_Normalize"))
        root.joinpath(folders[-1][1]).mkdir(exist_ok=True)

    write_json(root / TRANSFORMER_FILES[0], {"max_seq_length": max_length, "do_lower_case": do_lower_case})
    _write_prompts(root, prompts, default_prompt_name, head.similarity, truncate_dim)

    _write_list(root, folders)


def _write_prompts(
    folder: Path, prompts: Mapping[str, str], default_name: str | None, similarity: str, truncate_dim: int | None
) -> None:
    settings: dict[str, object] = {"prompts": dict(prompts), "default_prompt_name": default_name}
    if truncate_dim is not None:
        settings["truncate_dim"] = truncate_dim
    write_json(folder / "config_sentence_transformers.json", {**settings, "similarity_fn_name": similarity})


def _write_pooling(folder: Path, head: HeadConfig, dim: int) -> None:
    folder.mkdir(exist_ok=True)

    modes: dict[str, object] = {key: POOLINGS[mode] in head.poolings for key, mode in POOLING_KEYS.items()}
    if head.poolings != tuple(POOLINGS[mode] for key, mode in POOLING_KEYS.items() if modes[key]):
        names = {ours: theirs for theirs, ours in POOLINGS.items()}
        modes = {"pooling_mode": [names[pooling] for pooling in head.poolings]}

    write_json(
        folder / "config.json", {"word_embedding_dimension": dim, **modes, "include_prompt": head.include_prompt}
    )


def _write_dense(folder: Path, dense: DenseConfig, state: Mapping[str, Tensor], *, prefix: str) -> None:
    folder.mkdir(exist_ok=True)
    write_json(
        folder / "config.json",
        {
            "in_features": dense.input_dim,
            "out_features": dense.output_dim,
            "bias": dense.bias,
            "activation_function": ACTIVATIONS[dense.activation],
        },
    )
    names = ("weight", "bias") if dense.bias else ("weight",)
    tensors = {f"linear.{name}": state[f"{prefix}{name}"].detach().cpu().contiguous() for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_sentence_transformers(exported: Exportable, folder: Path) -> None:
    """Write a folder that sentence-transformers loads: the backbone and the modules after it."""
    head = head_of(exported.source.config)
    is_whole = head is None or ("image" in exported.model.modalities and head.is_pooler_alone)
    if not is_whole and "image" in exported.model.modalities:
        raise VembedError(
            f"sentence-transformers has no place for the `head` of {exported.source.family} models."
            " `--format hf` keeps it."
        )

    with new_folder(folder) as out:
        write_backbone(exported, out)

        if is_whole:
            _write_whole_model(exported, out)
        else:
            write_head(exported, out)
        finish_folder(exported, out, folder.name)


def can_write_head(exported: Exportable) -> bool:
    """Whether sentence-transformers has modules for the head."""
    head = head_of(exported.source.config)
    return head is not None and has_pooling(head) and exported.model.modalities == {"text"}


def write_head(exported: Exportable, folder: Path) -> None:
    settings = exported.processor.settings
    head = head_of(exported.source.config)
    assert head is not None
    write_modules(
        folder,
        head=replace(head, include_prompt=settings.include_prompt),
        max_length=settings.max_length,
        prompts=_named_prompts(exported),
        default_prompt_name=settings.default_prompt_name,
        do_lower_case=settings.do_lower_case,
        dense_state={k: v.cpu() for k, v in exported.model.state_dict().items() if k.startswith("head.dense.")},
        embedding_dim=exported.model.embedding_dim,
        truncate_dim=exported.truncate_dim,
    )


def _write_whole_model(exported: Exportable, folder: Path) -> None:
    """Name sentence-transformers' own module for such models; it reads transformers' layout."""
    family, settings = exported.source.family, exported.processor.settings
    checkpoint_format = get_checkpoint_format(family)
    if checkpoint_format is None or checkpoint_format.sentence_module is None:
        raise VembedError(f"{family} models cannot be written for sentence-transformers.")

    modules = [(checkpoint_format.sentence_module, "")]
    if exported.model.normalize:
        modules.append(("Normalize", "1_Normalize"))
        folder.joinpath("1_Normalize").mkdir()

    prompts = _named_prompts(exported)
    _write_prompts(folder, prompts, settings.default_prompt_name, exported.model.similarity, exported.truncate_dim)
    _write_list(folder, modules)


def _named_prompts(exported: Exportable) -> dict[str, str]:
    """The prompts, and those of both roles by the names for which sentence-transformers looks only."""
    processor = exported.processor
    return {**processor.settings.prompts, **{role: processor.prompt_for(role) or "" for role in EMPTY_PROMPTS}}


def _write_list(folder: Path, modules: Sequence[tuple[str, str]]) -> None:
    """Write ``modules.json``, of the class and the folder of each module.

    Last, because its presence is what makes the folder one of sentence-transformers.
    """
    entries = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for idx, (kind, path) in enumerate(modules)
    ]
    write_json(folder / "modules.json", entries)

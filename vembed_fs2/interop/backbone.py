"""Writes the configuration and the weights of a model in transformers' layout."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vembed_fs2.errors import VembedError
from vembed_fs2.interop import Exportable
from vembed_fs2.models.family import get_checkpoint_format


def write_backbone(exported: Exportable, folder: Path, *, with_dense: bool = False) -> None:
    """Write ``config.json`` and the weights.

    :param with_dense: whether the tensors of dense layers after the pooling are written as well.
    :raises VembedError: the family has no such format.
    """
    source = exported.source
    checkpoint_format = get_checkpoint_format(source.family)
    if checkpoint_format is None:
        raise VembedError(f"{source.family} models have no Hugging Face format.")

    state: dict[str, object] = {k: _plain(v) for k, v in exported.model.state_dict().items()}
    state = {k: v for k, v in state.items() if with_dense or not k.startswith("head.dense.")}
    checkpoint_format.save(folder, state, source.config)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()

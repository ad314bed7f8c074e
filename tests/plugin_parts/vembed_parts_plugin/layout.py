"""A layout of model folders: a configuration in ``model.json``, weights in ``weights.npz``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from vembed_fs2.files import new_folder, write_json
from vembed_fs2.formats.folder import HEAD_FILE, ModelFolder
from vembed_fs2.formats.registry import Layout
from vembed_fs2.interop import Exportable
from vembed_fs2.interop.backbone import write_backbone
from vembed_fs2.models.family import head_of


class NumpyFolder(ModelFolder):
    config_name = "model.json"

    def keys(self) -> frozenset[str]:
        return frozenset(self.tensors())

    def tensors(self) -> Mapping[str, Tensor]:
        with np.load(self.root / "weights.npz") as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def write_numpy(exported: Exportable, folder: Path) -> None:
    with new_folder(folder) as out:
        write_backbone(exported, out, with_dense=True)
        np.savez(out / "weights.npz", **load_file(out / "model.safetensors"))
        (out / "model.safetensors").unlink()
        (out / "config.json").rename(out / "model.json")

        if (head := head_of(exported.source.config)) is not None:
            write_json(out / HEAD_FILE, asdict(head))
        exported.processor.save(out)


NUMPY_LAYOUT: Final = Layout(
    name="numpy",
    detects=lambda path: (path / "model.json").is_file() and (path / "weights.npz").is_file(),
    open=NumpyFolder,
    write=write_numpy,
    config_name="model.json",
)

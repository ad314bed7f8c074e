"""Folders and runs that earlier versions wrote load as they did, and give the same embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vembed_fs2 import load_model
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.model import EmbeddingModel

FIXTURES = Path(__file__).parents[2] / "fixtures"

FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


def inputs() -> dict[str, EncoderBatch]:
    """Two texts, the second of which has padding, and three images."""
    ids = torch.arange(12).reshape(2, 6) % 7 + 3
    ids[:, -1], ids[1, 4:] = 19, torch.tensor([19, 0])
    mask = torch.arange(6) < torch.tensor([[6], [5]])
    pixels = torch.sin(0.1 * torch.arange(3 * 3 * 8 * 8)).reshape(3, 3, 8, 8)
    return {"text": EncoderBatch.of_text(ids, mask), "image": EncoderBatch.of_images(pixels)}


@torch.no_grad()
def encode(model: EmbeddingModel) -> dict[str, Tensor]:
    """All that the model returns for each modality, and what it says of its embeddings."""
    found: dict[str, Tensor] = {}
    for modality in sorted(model.modalities):
        output = model(inputs()[modality])
        tensors = {"values": output.values, "mask": output.mask, **output.parts}
        found |= {f"{modality}.{name}": value for name, value in tensors.items() if value is not None}
    similarity = ("cosine", "dot", "maxsim").index(model.similarity)
    found["facts"] = torch.tensor([model.embedding_dim, int(model.normalize), similarity])
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_what_was_written_before_gives_the_same_embeddings(name: str) -> None:
    expected = load_file(FIXTURES / "embeddings.safetensors")
    expected = {key.removeprefix(f"{name}."): v for key, v in expected.items() if key.startswith(f"{name}.")}
    torch.testing.assert_close(encode(load_model(FIXTURES / name)), expected, rtol=1e-5, atol=1e-6)

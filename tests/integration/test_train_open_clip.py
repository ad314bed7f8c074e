"""A model in the layout of open_clip, trained: the run prepares inputs as it did, and goes back to open_clip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from tests.integration.command_line import run
from tests.parity.open_clip_models import create_image, small_cfg, write_folder
from tests.parity.test_open_clip_folder import bert_tokenizer
from vembed_fs2 import Embedder

TEXTS = ["a b c", "Größe &amp; d", "e " * 40]


def write_model(folder: Path) -> None:
    """What neither transformers' CLIP nor its processors can express."""
    tokenizer = {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    model_cfg = small_cfg(**tokenizer, pool_type="last", no_causal_mask=True)
    model_cfg["vision_cfg"] |= {"no_ln_pre": True, "pool_type": "avg", "image_size": [8, 12], "patch_dropout": 0.5}
    write_folder(folder, model_cfg, {"resize_mode": "longest"}, tokenizer=bert_tokenizer(folder.parent / "vocab"))


def write_rows(folder: Path) -> Path:
    rows = []
    for row in range(8):
        create_image("RGB", (20 + row, 17), row).save(folder / f"{row}.png")
        rows.append({"query": f"{'abcdefgh'[row]} text", "positive": {"image": f"{row}.png"}})
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def encode(embedder: Embedder, image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([embedder.encode(TEXTS), embedder.encode([image])]))


def test_a_trained_model_goes_back_to_open_clip(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    file = write_rows(tmp_path)
    arguments = [f"model.path={tmp_path / 'model'}", f"dataset.paths=[{file}]", f"dataset.image_root={tmp_path}"]
    run(
        *("train", tmp_path / "run", "--config", *arguments),
        *("dataset.batch_size=4", "regime.num_steps=2", "optimizer.config.lr=0.01"),
    ).expect(0)
    image = create_image("P", (40, 31))
    untrained, trained = (Embedder.load(tmp_path / name, device="cpu") for name in ("model", "run"))
    assert trained.source.config == untrained.source.config
    assert trained.processor.settings == untrained.processor.settings
    vectors = encode(trained, image)
    assert float((vectors - encode(untrained, image)).abs().max()) > 1e-3

    trained.save_open_clip(tmp_path / "export")
    assert torch.equal(encode(Embedder.load(tmp_path / "export", device="cpu"), image), vectors)
    name = f"local-dir:{tmp_path / 'export'}"
    model, transform = open_clip.create_model_from_pretrained(name, return_transform=True)
    with torch.no_grad():
        texts = model.eval().encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
        images = model.encode_image(transform(image).unsqueeze(0), normalize=True)
    torch.testing.assert_close(vectors, torch.cat([texts, images]), rtol=0, atol=1e-5)

"""SigLIP learns digits from random weights with the sigmoid loss, on images of one size and of any."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.command_line import run
from vembed_fs2.inference.embedder import Embedder

NAFLEX = {
    "image_processor_type": "Siglip2ImageProcessor",
    "patch_size": 4,
    "max_num_patches": 12,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.mark.parametrize("arch", ["tiny", "tiny_naflex"])
def test_sigmoid_loss_trains_temperature_and_bias(arch: str, digits: Path, clip_folder: Path, tmp_path: Path) -> None:
    processor = tmp_path / "processor"
    shutil.copytree(clip_folder, processor, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    if arch == "tiny_naflex":
        processor.joinpath("preprocessor_config.json").write_text(json.dumps(NAFLEX))
    out = tmp_path / "run"
    run(
        "train", out, "--no-rich", "--config", "model.family=vembed_siglip", f"model.arch={arch}",
        f"processor.path={processor}", f"dataset.paths=[{digits}/train.jsonl]", f"dataset.image_root={digits}",
        "dataset.max_rows=640", "dataset.batch_size=32", "loss.name=sigmoid", "regime.num_steps=16",
        "regime.publish_metrics_every_n_steps=4", "regime.checkpoint_every_n_steps=16", "optimizer.config.lr=0.001",
        "grad_cache.chunk_tokens=256", "grad_cache.activation_budget=0", "trainer.mixed_precision.mode=off",
    ).expect(0)  # fmt: skip

    rows = [json.loads(line) for line in out.joinpath("metrics", "train.jsonl").read_text().splitlines()]
    assert rows[-1]["Loss"] < rows[0]["Loss"]
    assert rows[-1]["Chunks per Step"] > 2
    embedder = Embedder.load(out)
    scale, bias = embedder.model.logit_scale, embedder.model.logit_bias
    assert scale is not None
    assert bias is not None
    assert 1e-4 < abs(scale.item() - math.log(10.0)) < 1.0
    assert 1e-4 < abs(bias.item() + 10.0) < 1.0
    inputs = ["a handwritten three", Image.new("L", (20, 9), 77), Image.new("RGB", (8, 8))]
    vectors = embedder.encode(inputs)
    embedder.save_hf(tmp_path / "export")
    assert np.array_equal(Embedder.load(tmp_path / "export").encode(inputs), vectors)

"""A small model of texts and images in any order, and rows for it."""

from __future__ import annotations

import random

import torch

from vembed_fs2.embedding.inputs import ImageInputs, TextInputs
from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.models.qwen3_vl import Qwen3VLConfig, VisionConfig

CONFIG = Qwen3VLConfig(
    model_dim=16, max_seq_len=128, vocab_size=51, num_layers=2, num_attn_heads=4, num_key_value_heads=2, head_dim=8,
    ffn_inner_dim=24, attn_dropout_p=0.1, logit_scale_init=2.0, mrope_section=[2, 1, 1], image_idx=40, video_idx=41,
    vision_start_idx=42, vision_end_idx=43,
    vision=VisionConfig(
        model_dim=16, num_layers=2, num_attn_heads=2, ffn_inner_dim=24, patch_size=2, num_positions=9,
        deepstack_layers=[0],
    ),
)  # fmt: skip


def rows(count: int, seed: int, *, has_images: bool = True) -> EncoderBatch:
    """Texts, and texts with one to three images of different sizes, in one batch."""
    draw = random.Random(seed)
    noise = torch.Generator().manual_seed(seed)

    ids: list[list[int]] = []
    grids, owners = [], []
    for row in range(count):
        tokens = [draw.randrange(1, 40) for _ in range(draw.randint(1, 6))]
        for _ in range((row + seed) % 4 if has_images else 0):
            grid = [1, 2 * draw.randint(1, 2), 2 * draw.randint(1, 3)]
            grids.append(grid)
            owners.append(row)
            tokens += [42, *[40] * (grid[1] * grid[2] // 4), 43, draw.randrange(1, 40)]
        ids.append(tokens)

    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.arange(width) < torch.tensor([len(row) for row in ids]).unsqueeze(1)
    text = TextInputs(padded, torch.arange(count), mask)
    if not grids:
        return EncoderBatch(count, text)

    sizes = torch.tensor(grids)
    patches = torch.randn(int(sizes.prod(1).sum()), CONFIG.vision.patch_dim, generator=noise)
    return EncoderBatch(count, text, ImageInputs(patches, torch.tensor(owners), sizes))

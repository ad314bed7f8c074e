from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from vembed_fs2.embedding.model import EncoderBatch, HeadConfig
from vembed_fs2.models.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig

from ..families import Case
from ..steps import images, texts


def create_config(*, naflex: bool) -> SiglipConfig:
    return SiglipConfig(
        text=SiglipTextConfig(
            model_dim=16, num_layers=2, num_attn_heads=2, ffn_inner_dim=24, vocab_size=50, max_seq_len=12,
            projection_dim=16, attn_dropout_p=0.1,
        ),
        vision=SiglipVisionConfig(
            model_dim=16, num_layers=2, num_attn_heads=2, ffn_inner_dim=24, image_size=8, patch_size=4, num_patches=9,
            attn_dropout_p=0.1,
        ),
        naflex=naflex,
        logit_scale_init=2.0,
    )  # fmt: skip


def full_texts(rows: int, seed: int) -> EncoderBatch:
    """Texts that are padded without a mask, as SigLIP reads them."""
    batch = texts(rows, seed)
    assert batch.text is not None
    return EncoderBatch.of_text(batch.text.input_ids)


def patches(rows: int, seed: int) -> EncoderBatch:
    """Images of several shapes."""
    g = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(rows):
        height, width = (int(n) for n in torch.randint(1, 4, (2,), generator=g))
        length = height * width
        pixels = pad(torch.randn(1, length, 48, generator=g), (0, 0, 0, 9 - length))
        mask = (torch.arange(9) < length).unsqueeze(0)
        parts.append(EncoderBatch.of_patches(pixels, mask, torch.tensor([[height, width]])))
    return EncoderBatch.concat(parts)


CASES = {
    "texts to images": Case("vembed_siglip", create_config(naflex=False), full_texts, images),
    "masked texts to patches": Case("vembed_siglip", create_config(naflex=True), texts, patches),
    "vectors": Case(
        "vembed_siglip", replace(create_config(naflex=True), head=HeadConfig(pooling="none")), texts, patches
    ),
}

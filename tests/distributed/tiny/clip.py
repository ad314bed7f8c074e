from __future__ import annotations

from dataclasses import replace

from vembed_fs2.embedding.model import EncoderBatch, HeadConfig

from ..families import Case
from ..steps import CLIP, images, texts


def texts_with_images(rows: int, seed: int) -> EncoderBatch:
    text, image = texts(rows, seed), images(rows, seed + 1)
    return EncoderBatch(rows, text.text, image.images)


def texts_or_images(rows: int, seed: int) -> EncoderBatch:
    return EncoderBatch.concat([texts(rows // 2, seed), images(rows - rows // 2, seed + 1)])


CASES = {
    "texts to images": Case("vembed_clip", CLIP, texts, images),
    "images to both": Case("vembed_clip", CLIP, images, texts_with_images),
    "vectors": Case("vembed_clip", replace(CLIP, head=HeadConfig(pooling="none")), texts, texts_or_images),
}

from __future__ import annotations

from vembed_fs2.embedding.model import EncoderBatch

from ..families import Case
from ..steps import CLIP, images, texts


def texts_with_images(rows: int, seed: int) -> EncoderBatch:
    text, image = texts(rows, seed), images(rows, seed + 1)
    return EncoderBatch(rows, text.text, image.images)


CASES = {
    "texts to images": Case("vembed_clip", CLIP, texts, images),
    "images to both": Case("vembed_clip", CLIP, images, texts_with_images),
}

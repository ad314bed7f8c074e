from __future__ import annotations

from dataclasses import replace

from vembed_fs2.embedding.model import EncoderBatch

from ..families import Case
from ..steps import CLIP, images, texts


def texts_with_images(rows: int, seed: int) -> EncoderBatch:
    text, image = texts(rows, seed), images(rows, seed + 1)
    return replace(
        text, pixel_values=image.pixel_values, image_rows=image.image_rows, tokens_per_image=image.tokens_per_image
    )


CASES = {
    "texts to images": Case("vembed_clip", CLIP, texts, images),
    "images to both": Case("vembed_clip", CLIP, images, texts_with_images),
}

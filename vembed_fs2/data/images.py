"""Decodes the images of rows, to find those that cannot be used before a model needs them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vembed_fs2.data.example import Example, ImageSource
from vembed_fs2.errors import DataError


def decode_images(
    examples: Sequence[Example], *, allow_urls: bool = False
) -> Iterator[list[tuple[int, int]] | DataError]:
    """Decode the images of rows as a training would, in parallel.

    :param allow_urls: whether to fetch images that are URLs; they are left out otherwise.
    :returns: For each row the widths and heights of its images in pixels, or an
        error that names file and line.
    """

    def decode(example: Example) -> list[tuple[int, int]] | DataError:
        try:
            return [_size(image, allow_urls) for image in _images(example) if allow_urls or not isinstance(image, str)]
        except DataError as ex:
            return DataError(f"{example.source}: {ex}")

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        yield from pool.map(decode, examples)


def has_images(example: Example) -> bool:
    """Whether any part of a row is an image."""
    return any(True for _ in _images(example))


def _images(example: Example) -> Iterator[ImageSource]:
    for item in example.items:
        yield from item.images


def _size(image: ImageSource, allow_urls: bool) -> tuple[int, int]:
    from vembed_fs2.data.decode import decode_image

    return decode_image(image, allow_urls=allow_urls).size

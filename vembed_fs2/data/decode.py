"""Decodes an image: the only place that reads image files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Final
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image, ImageOps, UnidentifiedImageError

from vembed_fs2.errors import DataError

MAX_PIXELS: Final = 100_000_000
"""The default limit of an image's pixels; decoded as RGB that is 0.3 GB."""


_BYTES_PER_PIXEL: Final = 16
"""More than any format needs: what is larger than this times the pixel limit is not read."""


_URL_TIMEOUT: Final = 30.0


_ORIENTATION_TAG: Final = 0x0112


_pillow_lock: Final = Lock()


def decode_image(
    source: Path | str | bytes | Image.Image,
    *,
    root: Path | None = None,
    allow_urls: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode an image completely and turn it upright, as its EXIF orientation says.

    The mode stays as it is in the file: :class:`ImageProcessor` converts it.

    :param source: a file, a URL, the bytes of a file, or an image that is open already.
    :param root: where files must lie, after symbolic links; relative paths start there.
    :param allow_urls: whether ``source`` may be an ``http`` or ``https`` URL.
    :param max_pixels: the largest number of pixels; it is checked before decoding.
    :raises DataError: the image cannot be read, or must not be. The message names it.
    """
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "The image"
        image = source
    else:
        name, content = _read(source, root, allow_urls, _BYTES_PER_PIXEL * max_pixels)
        image = _open(name, content, max_pixels)

    width, height = image.size
    if width * height > max_pixels:
        raise DataError(f"{name} has {width} x {height} pixels, more than the limit of {max_pixels}.")
    if width * height == 0:
        raise DataError(f"{name} has no pixels: its size is {width} x {height}.")

    return _load(name, image, max_pixels)


def _open(name: str, content: bytes, max_pixels: int) -> Image.Image:
    if not content:
        raise DataError(f"{name} is empty.")

    try:
        with _pillow_limit(max_pixels):
            return Image.open(BytesIO(content))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name} has more pixels than the limit of {max_pixels}.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image, or of a format that is not supported.") from None
    # Pillow's readers raise errors of many kinds on broken files.
    except Exception as ex:
        raise DataError(f"{name} is not a valid image: {ex}.") from None


def _load(name: str, image: Image.Image, max_pixels: int) -> Image.Image:
    with _pillow_lock:  # never another thread's limit
        limit = Image.MAX_IMAGE_PIXELS

    try:
        if limit is not None and image.width * image.height > limit:
            with _pillow_limit(max_pixels):
                image.load()
        else:
            image.load()
    except Exception as ex:
        raise DataError(f"{name} is truncated or broken: {ex}.") from None

    try:
        if image.getexif().get(_ORIENTATION_TAG, 1) != 1:
            return ImageOps.exif_transpose(image)
    except Exception:  # Pillow parses EXIF data now, and raises errors of many kinds on broken ones.
        return image

    return image


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Make ``max_pixels`` Pillow's own limit for a while. It is a global that Pillow checks while it opens files."""
    with _pillow_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read(source: Path | str | bytes, root: Path | None, allow_urls: bool, max_bytes: int) -> tuple[str, bytes]:
    """Return the name of ``source`` in errors, and its content."""
    if isinstance(source, bytes):
        return f"The image of {len(source)} bytes", source
    if isinstance(source, str) and "://" in source:
        return _fetch(source, allow_urls, max_bytes)

    try:
        file = _resolve(Path(source), root)
        if not file.is_file():
            raise DataError(f"{file} is not a file." if file.exists() else f"{file} does not exist.")
        if file.stat().st_size > max_bytes:
            raise DataError(f"{file} is larger than {max_bytes} bytes.")
        return str(file), file.read_bytes()
    except (OSError, ValueError, RuntimeError) as ex:
        reason = getattr(ex, "strerror", None) or ex
        raise DataError(f"{source} cannot be read: {reason}.") from None


def _resolve(path: Path, root: Path | None) -> Path:
    if root is None:
        return path

    root = root.resolve()
    file = (root / path).resolve()
    if not file.is_relative_to(root):
        raise DataError(f"{path} is outside the image folder {root}.")

    return file


def _fetch(url: str, allow_urls: bool, max_bytes: int) -> tuple[str, bytes]:
    # The query of a URL may hold a signature, which must not reach a log.
    name = url.partition("?")[0]
    if urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{name} is neither a file nor an http or https URL.")
    if not allow_urls:
        raise DataError(f"{name} is a URL, and fetching is off. Set `allow_urls` to fetch it.")

    try:
        with urlopen(Request(url, headers={"User-Agent": "vembed_fs2"}), timeout=_URL_TIMEOUT) as response:
            content: bytes = response.read(max_bytes + 1)
    # Network, protocol and URL errors have no common base.
    except Exception as ex:
        raise DataError(f"{name} cannot be fetched: {ex}.") from None

    if len(content) > max_bytes:
        raise DataError(f"{name} is larger than {max_bytes} bytes.")

    return name, content

"""What is not a whole image is an error that names it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vembed_fs2.data.decode import decode_image
from vembed_fs2.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def picture(mode: str = "RGB") -> Image.Image:
    image = Image.fromarray(NOISE)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(NOISE[..., 0]))
    return Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)


def encode(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(encode(picture()))
    return path


def test_every_source_gives_the_same_image(file: Path) -> None:
    for source in (file, str(file), file.read_bytes(), Image.open(file), picture()):
        assert np.array_equal(np.asarray(decode_image(source)), NOISE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_every_mode(mode: str) -> None:
    decoded = decode_image(picture(mode))
    assert decoded.mode == mode
    assert decoded.convert("RGB").size == (32, 24)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "png"),
        ("L", "jpeg"),
        ("LA", "png"),
        ("P", "gif"),
        ("P", "png"),
        ("RGBA", "webp"),
        ("CMYK", "jpeg"),
        ("CMYK", "tiff"),
        ("I;16", "png"),
        ("I;16", "tiff"),
        ("F", "tiff"),
        ("RGB", "bmp"),
        ("RGB", "ppm"),
    ],
)
def test_every_format(mode: str, kind: str) -> None:
    decoded = decode_image(encode(picture(mode), kind))
    assert decoded.mode == mode
    assert decoded.size == (32, 24)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm"])
def test_truncated_image(kind: str) -> None:
    content = encode(picture(), kind)
    for length in range(1, len(content) // 2, max(1, len(content) // 40)):
        with pytest.raises(DataError, match=rf"The image of {length} bytes"):
            decode_image(content[:length])


def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = {
        "empty.png": b"",
        "text.jpg": b"not an image at all",
        "page.html": b"<html>404</html>",
        "truncated.png": encode(picture())[:300],
        "header.jpg": encode(picture(), "jpeg")[:30],
        "damaged.png": encode(picture())[:200] + bytes(200) + encode(picture())[400:],
    }
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=name):
            decode_image(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        decode_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="is not a file"):
        decode_image(tmp_path)
    with pytest.raises(DataError, match=r"does not exist|cannot be read"):
        decode_image("a\0b.png")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match="loop"):
        decode_image(loop, root=tmp_path)


def test_image_without_pixels() -> None:
    with pytest.raises(DataError, match="0 x 5"):
        decode_image(Image.new("RGB", (0, 5)))


def test_lazily_opened_broken_image(tmp_path: Path) -> None:
    path = tmp_path / "lazy.png"
    path.write_bytes(encode(picture())[:400])
    with pytest.raises(DataError, match=r"lazy\.png is truncated or broken"):
        decode_image(Image.open(path))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
@pytest.mark.parametrize("pillow_limit", [None, 10, 1000])
def test_pixel_limit_is_ours_alone(kind: str, pillow_limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    content = encode(picture(), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(content, max_pixels=32 * 24).size == (32, 24)
        for limit in (32 * 24 - 1, 32 * 12 - 1, 20):
            with pytest.raises(DataError, match=f"limit of {limit}|larger than"):
                decode_image(content, max_pixels=limit)
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


def test_size_is_checked_before_decoding() -> None:
    # A header that promises 10^10 pixels, and almost no data.
    header = encode(Image.new("1", (1, 1)), "png")
    huge = header[:16] + (100_000).to_bytes(4, "big") * 2 + header[24:]
    with pytest.raises(DataError):
        decode_image(huge)
    with pytest.raises(DataError, match=r"40000 x 40000|limit of 100000000"):
        decode_image(b"P5 40000 40000 255\n" + bytes(10))


def test_limit_of_an_open_image() -> None:
    with pytest.raises(DataError, match="32 x 24 pixels, more than the limit of 100"):
        decode_image(picture(), max_pixels=100)


def test_pillow_limit_survives_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    contents = [encode(picture(), kind) for kind in ("png", "jpeg", "webp", "tiff")] * 25
    with ThreadPoolExecutor(8) as pool:
        assert all(image.size == (32, 24) for image in pool.map(decode_image, contents))
    assert Image.MAX_IMAGE_PIXELS == 500


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :16] = 255  # the top left corner is white
    inverse = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2),
        lambda a: np.rot90(a),
        lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        lambda a: np.rot90(a, -1),
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(inverse[orientation - 1](upright)))
    decoded = decode_image(encode(stored, exif=exif))
    assert np.array_equal(np.asarray(decoded), upright)
    assert np.array_equal(np.asarray(decode_image(decoded)), upright)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_an_image_whose_exif_data_is_broken_is_read_as_it_is(kind: str) -> None:
    image = Image.radial_gradient("L").convert("RGB")
    for exif in (b"not exif", b"Exif\x00\x00II*\x00\xff\xff\xff\xff"):
        try:
            content = encode(image, kind, exif=exif)
        except Exception:  # Pillow itself writes no such file.
            continue
        assert decode_image(content).size == image.size


def test_root(file: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.joinpath("sub").mkdir(parents=True)
    inside = root / "sub" / "in.png"
    inside.write_bytes(file.read_bytes())
    root.joinpath("good").symlink_to(inside)
    root.joinpath("bad").symlink_to(file)
    for good in ("sub/in.png", Path("sub/in.png"), inside, "sub/../sub/in.png", "good"):
        assert decode_image(good, root=root).size == (32, 24)
    for bad in (file, "../picture.png", "sub/../../picture.png", "bad", "/etc/passwd"):
        with pytest.raises(DataError, match="outside the image folder"):
            decode_image(bad, root=root)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path.startswith("/picture.png")
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(encode(picture()) if found else b"no")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    http = HTTPServer(("127.0.0.1", 0), _Handler)
    thread = Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


def test_urls(server: str) -> None:
    url = f"{server}/picture.png?signature=secret"
    with pytest.raises(DataError, match="allow_urls") as caught:
        decode_image(url)
    assert "secret" not in str(caught.value)
    assert decode_image(url, allow_urls=True).size == (32, 24)
    with pytest.raises(DataError, match=r"other\.png cannot be fetched: .*404"):
        decode_image(f"{server}/other.png", allow_urls=True)
    with pytest.raises(DataError, match="larger than"):
        decode_image(url, allow_urls=True, max_pixels=4)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a.png", "s3://bucket/a.png"])
def test_other_schemes(url: str) -> None:
    with pytest.raises(DataError, match="neither a file nor an http"):
        decode_image(url, allow_urls=True)

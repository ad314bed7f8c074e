"""Images and texts as open_clip prepares them: ``preprocess_cfg`` and ``text_cfg`` of its folders.

Its transforms are torchvision's on Pillow images, which resize and crop before
they convert to RGB; transformers' processors convert first, and round the
offsets of crops down.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, final

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import CLIPTokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from vembed_fs2.errors import DataError, ModelLoadError, VembedError
from vembed_fs2.formats.open_clip import read_options, read_pair

OPENAI_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Final = (0.26862954, 0.26130258, 0.27577711)

_RESAMPLING: Final = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

_PREPROCESS_DEFAULTS: Final = {
    "mean": None,
    "std": None,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}

# The image tower sets the size, whatever this says.
_PREPROCESS_IGNORED: Final = ("size",)

_PLAIN: Final = re.compile(r"[\t\n -%'-~]*")
"""Texts that neither ftfy nor unescaping of HTML changes: printable ASCII without ``&``."""

_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)

_BPE_FILE: Final = "bpe_simple_vocab_16e6.txt.gz"
"""The vocabulary in open_clip's package."""

_NUM_MERGES: Final = 49_152 - 256 - 2

_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""Contractions, words, digits, and runs of all else."""


@dataclass(frozen=True, kw_only=True)
class OpenClipPreprocessing:
    """``preprocess_cfg``, and the image size of ``vision_cfg``."""

    size: tuple[int, int]
    """Height and width of pixel values."""

    mean: tuple[float, float, float] = OPENAI_MEAN
    """The mean of each channel, for values in [0, 1]."""

    std: tuple[float, float, float] = OPENAI_STD
    """The standard deviation of each channel."""

    interpolation: str = "bicubic"
    """``bicubic`` or ``bilinear``."""

    resize_mode: str = "shortest"
    """
    What is resized to ``size``: the ``shortest`` edge, and the rest is cropped;
    the ``longest``, and the rest is filled; or both, whatever the aspect ratio
    (``squash``).
    """

    fill_color: int = 0
    """What fills the rest, from 0 to 255."""

    @staticmethod
    def read(values: Mapping[str, Any], size: int | tuple[int, int]) -> OpenClipPreprocessing:
        """Read ``preprocess_cfg``.

        :raises ModelLoadError: an option is not valid; the message names it.
        """
        where = "preprocess_cfg."

        # An option that is null has its default.
        values = {name: value for name, value in values.items() if value is not None}
        options = read_options(values, where, _PREPROCESS_DEFAULTS, fixed={"mode": "RGB"}, ignored=_PREPROCESS_IGNORED)

        # For training, at random; for inference, bicubic.
        interpolation = "bicubic" if options["interpolation"] == "random" else options["interpolation"]
        if interpolation not in _RESAMPLING:
            raise ModelLoadError(f"`{where}interpolation` is '{interpolation}', which is not supported.")
        if options["resize_mode"] not in ("shortest", "longest", "squash"):
            raise ModelLoadError(f"`{where}resize_mode` is '{options['resize_mode']}', which is not supported.")

        return OpenClipPreprocessing(
            size=(size, size) if isinstance(size, int) else size,
            mean=_read_channels(options["mean"], OPENAI_MEAN, f"{where}mean"),
            std=_read_channels(options["std"], OPENAI_STD, f"{where}std"),
            interpolation=interpolation,
            resize_mode=options["resize_mode"],
            fill_color=options["fill_color"],
        )


def _read_channels(value: object, default: tuple[float, float, float], name: str) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, (int, float)) else value or default
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ModelLoadError(f"`{name}` must be three numbers, but is {value!r} instead.")

    red, green, blue = (float(v) for v in values)
    return red, green, blue


@final
class OpenClipTransform:
    """Turns one image into pixel values, exactly as open_clip's ``image_transform`` does."""

    def __init__(self, config: OpenClipPreprocessing) -> None:
        self.config = config
        self.image_mean = list(config.mean)

        height, width = config.size

        # As transformers' processors say it.
        self.do_resize = True
        self.size = {"height": height, "width": width}
        if config.resize_mode == "shortest":
            self.size = {"shortest_edge": max(height, width)}

    def __call__(self, image: Image.Image) -> np.ndarray[Any, Any]:
        """Prepare an image of any mode. *Returns:* ``[3, H, W]``, float32."""
        match self.config.resize_mode:
            case "shortest":
                image = _crop(self._resize_shortest(image), self.config.size)
            case "longest":
                image = _pad(self._resize_by_ratio(image, max), self.config.size, self.config.fill_color)
                image = _crop(image, self.config.size)
            case _:
                image = self._resize(image, *self.config.size)

        array = np.array(image.convert("RGB"), dtype=np.uint8)
        pixels = torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div(255)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.config.mean, self.config.std))
        normalized: np.ndarray[Any, Any] = pixels.sub_(mean).div_(std).numpy()

        return normalized

    def _resize_shortest(self, image: Image.Image) -> Image.Image:
        height, width = self.config.size
        if height != width:
            # open_clip does not hand over its interpolation here.
            return self._resize_by_ratio(image, min, Image.Resampling.BICUBIC)

        short, long = sorted(image.size)
        long = int(height * long / short)
        return self._resize(image, *((long, height) if image.height > image.width else (height, long)))

    def _resize_by_ratio(
        self, image: Image.Image, choose: Any, resampling: Image.Resampling | None = None
    ) -> Image.Image:
        """Resize so that the larger (``max``) or smaller (``min``) edge, relative to ``size``, fits."""
        height, width = self.config.size
        ratio = choose(image.height / height, image.width / width)
        return self._resize(image, round(image.height / ratio), round(image.width / ratio), resampling)

    def _resize(
        self, image: Image.Image, height: int, width: int, resampling: Image.Resampling | None = None
    ) -> Image.Image:
        if min(height, width) < 1:
            raise DataError(f"An image of {image.width} x {image.height} pixels is too narrow to be resized.")
        if image.size == (width, height):
            return image
        return image.resize((width, height), resampling or _RESAMPLING[self.config.interpolation])

    def to_json_string(self) -> str:
        """Describe the transform: for us, and as closely as it can be for transformers."""
        height, width = self.config.size
        is_cropped = self.config.resize_mode == "shortest"

        values = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": self.size,
            "resample": int(_RESAMPLING[self.config.interpolation]),
            "do_center_crop": is_cropped,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.config.mean),
            "image_std": list(self.config.std),
            "do_convert_rgb": True,
            "open_clip": asdict(self.config),
        }
        if self.config.resize_mode == "longest":
            # It has nothing that fills images up, and must not do something else.
            values["image_processor_type"] = "OpenClipImageProcessor"

        return json.dumps(values)

    @staticmethod
    def of_saved(values: Mapping[str, Any]) -> OpenClipTransform:
        """Read what :meth:`to_json_string` wrote under ``open_clip``.

        :raises ModelLoadError: it is not valid.
        """
        size = read_pair(values.get("size"), "open_clip.size")
        return OpenClipTransform(OpenClipPreprocessing.read(values, size))


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop the centre. Offsets are rounded, half of one to the even number."""
    height, width = size
    top = round((image.height - height) / 2)
    left = round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _pad(image: Image.Image, size: tuple[int, int], color: int) -> Image.Image:
    """Fill an image up on all sides; where the number of pixels is odd, right and bottom have more."""
    missing = max(size[1] - image.width, 0), max(size[0] - image.height, 0)
    if not any(missing):
        return image

    left, top = missing[0] // 2, missing[1] // 2
    border = (left, top, missing[0] - left, missing[1] - top)
    num_bands = len(image.getbands())

    palette = image.getpalette() if image.mode == "P" else None
    image = ImageOps.expand(image, border, fill=color if num_bands == 1 else (color,) * num_bands)
    if palette is not None:
        image.putpalette(palette)

    return image


@dataclass(frozen=True, kw_only=True)
class OpenClipTexts:
    """How texts are tokenized: the fields of ``ProcessorSettings``."""

    text_cleaning: str = ""
    open_clip_bpe: bool = False
    strip_sep_token: bool = False

    def clean(self, texts: Sequence[str]) -> list[str]:
        """Clean texts before tokenization."""
        return [clean_text(text, self.text_cleaning) for text in texts] if self.text_cleaning else list(texts)

    def change_backend(self, backend: Tokenizer) -> None:
        """Make a tokenizer tokenize cleaned texts as open_clip's own does.

        CLIP's would normalise and lowercase them, and would take the names of
        special tokens in a text for these tokens.

        :raises ModelLoadError: it is not CLIP's.
        """
        if not self.open_clip_bpe:
            return

        if getattr(backend.model, "end_of_word_suffix", None) != "</w>":
            raise ModelLoadError(
                "The folder's tokenizer is not CLIP's, which open_clip uses if `text_cfg` has no `hf_tokenizer_name`."
            )

        backend.normalizer = normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.encode_special_tokens = True


def load_built_in_tokenizer(folder: Path) -> CLIPTokenizerFast:
    """Load the tokenizer of CLIP, which open_clip brings along for folders that have none.

    :param folder: the model's folder.
    :raises ModelLoadError: open_clip is not installed, or lacks the file.
    """
    spec = find_spec("open_clip")  # Not imported: that takes seconds.
    file = None if spec is None or spec.origin is None else Path(spec.origin).with_name(_BPE_FILE)
    if file is None or not file.is_file():
        raise ModelLoadError(
            f"{folder} has no tokenizer, so the model uses the vocabulary that comes with open_clip, which is not "
            "installed: pip install 'vembed_fs2[open-clip]'."
        )

    # After a line for the version. More merges than these follow, which CLIP does not use.
    merges = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")[1 : _NUM_MERGES + 1]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: idx for idx, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}

    with TemporaryDirectory() as name:
        files = Path(name, "vocab.json"), Path(name, "merges.txt")
        files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
        files[1].write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        return CLIPTokenizerFast(str(files[0]), str(files[1]), model_max_length=77)


def clean_text(text: str, cleaning: str) -> str:
    """Repair a text (ftfy), unescape HTML, make each white space a blank, and do what ``cleaning`` says.

    :param cleaning: ``whitespace`` (nothing else), ``lower`` (lowercase) or
        ``canonicalize`` (lowercase, and no punctuation).
    :raises VembedError: the text is not plain ASCII, and ftfy is not installed.
    """
    if _PLAIN.fullmatch(text) is None:
        text = html.unescape(html.unescape(_fix_text(text)))

    text = text.strip()
    if cleaning == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)

    text = " ".join(text.split())
    return text if cleaning == "whitespace" else text.lower()


def _fix_text(text: str) -> str:
    try:
        import ftfy
    except ImportError:
        raise VembedError(
            "Models of open_clip repair texts with ftfy, which is not installed: pip install 'vembed_fs2[open-clip]'."
        ) from None

    fixed: str = ftfy.fix_text(text)
    return fixed

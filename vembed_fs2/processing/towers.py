"""The processor of models that encode texts and images apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from vembed_fs2.data.decode import decode_image
from vembed_fs2.data.example import Item, Role
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.inputs import ImageInputs, TextInputs
from vembed_fs2.embedding.model import TextPadding
from vembed_fs2.errors import DataError
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.processing.image import ImageProcessor
from vembed_fs2.processing.open_clip import OpenClipTexts
from vembed_fs2.processing.patches import pack_patches
from vembed_fs2.processing.processor import Processor
from vembed_fs2.processing.settings import ProcessorSettings, read_settings, save_settings
from vembed_fs2.processing.siglip_tokenizer import reads_lower_case
from vembed_fs2.processing.text import TextProcessor


@dataclass(frozen=True)
class PreparedItem:
    """An input whose images are pixel values."""

    item: Item

    pixels: tuple[Tensor, ...]
    """The images in their order. *Shape:* ``[C, H, W]`` each."""


@final
class TowerProcessor(Processor[PreparedItem]):
    """Tokenizes texts, decodes and transforms images.

    The order of a row's texts and images is not known to the model, so a row may
    hold one text, before or after its images.
    """

    def __init__(
        self,
        text: TextProcessor | None,
        image: ImageProcessor | None,
        settings: ProcessorSettings | None = None,
        *,
        tokens_per_image: int = 1,
        text_padding: TextPadding = "longest",
    ) -> None:
        super().__init__(settings)

        self.text = text
        self.image = image
        self.tokens_per_image = tokens_per_image
        self.text_padding = text_padding

        self.takes_one_part = False
        """If ``True``, an input must be one text or one image: the model has several vectors per row."""

    @override
    def prepare(self, item: Item) -> PreparedItem:
        try:
            self._check(item)

            # One by one: photographs are a hundred times larger than the pixels that a model takes.
            pixels = []
            for source in item.images:
                image = decode_image(source, root=self.image_root, allow_urls=self.allow_urls)
                assert self.image is not None
                pixels.append(self.image([image])[0])
        except DataError as ex:
            raise DataError(f"{item.source}: {ex}" if item.source else str(ex)) from ex

        return PreparedItem(item, tuple(pixels))

    def _check(self, item: Item) -> None:
        if item.text is not None and self.text is None:
            raise DataError("The model has no text encoder, but an input has a text.")
        if item.images and self.image is None:
            raise DataError("The model has no image encoder, but an input has an image.")

        if self.takes_one_part and len(item.parts) > 1:
            raise DataError(
                "An input of a model with several vectors per row must be one text or one image, but is"
                f" {item.describe_order()}."
            )
        if item.is_interleaved:
            raise DataError(item.order_error("The model"))

    @override
    def collate(
        self, prepared: Sequence[PreparedItem], *, role: Role | None = None, prompt: str | None = None
    ) -> EncoderBatch:
        if prompt is None:
            prompt = self.prompt_for(role)

        texts = self._collate_texts([p.item for p in prepared], prompt or "")
        return EncoderBatch(len(prepared), texts, self._collate_images([p.pixels for p in prepared]))

    def _collate_texts(self, items: Sequence[Item], prompt: str) -> TextInputs | None:
        texts = [
            (row, item.text, self._prefix(item, prompt)) for row, item in enumerate(items) if item.text is not None
        ]
        if not texts:
            return None

        rows, values, prefixes = zip(*texts)
        has_prefix = any(prefixes)
        assert self.text is not None
        tokens = self.text(
            values,
            prefixes=prefixes if has_prefix else None,
            mask_prefixes=has_prefix and not self.settings.include_prompt,
        )

        return TextInputs(
            tokens.input_ids,
            torch.tensor(rows),
            tokens.attention_mask,
            tokens.token_type_ids,
            tokens.pooling_mask,
            fixed_width=self.text_padding == "max_length",
        )

    def _prefix(self, item: Item, prompt: str) -> str:
        if item.instruction:
            return self.settings.instruction_template.replace("{instruction}", item.instruction)
        return prompt

    def _collate_images(self, pixels: Sequence[tuple[Tensor, ...]]) -> ImageInputs | None:
        rows = torch.tensor([row for row, images in enumerate(pixels) for _ in images], dtype=torch.int64)

        images = [image for row in pixels for image in row]
        if not images:
            return None

        patch_size = getattr(self.image, "patch_size", None)
        if patch_size is not None:
            patches, grids = pack_patches(images, patch_size)
            return ImageInputs(patches, rows, grids=grids)

        if len({image.shape for image in images}) > 1:
            raise DataError(
                "Images have different sizes after resizing. Set `do_center_crop`, or a `size` of `height` and `width`."
            )

        return ImageInputs(torch.stack(images), rows, tokens_per_image=self.tokens_per_image)

    @override
    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

        if self.text is not None:
            self.text.save(folder)
        if self.image is not None:
            self.image.save(folder)
        save_settings(self.settings, folder)

    @staticmethod
    def load(
        folder: Path,
        modalities: frozenset[str],
        *,
        max_length: int | None = None,
        model_max_length: int | None = None,
        vocab_size: int | None = None,
        tokens_per_image: int = 1,
        text_padding: TextPadding = "longest",
    ) -> TowerProcessor:
        """Load what a Hugging Face, sentence-transformers or run folder says.

        :param modalities: what the model takes: ``text``, ``image`` or both.
        :param max_length: overrides the folder's longest text.
        :param model_max_length: the longest text that the model can take at all.
        :param vocab_size: the number of tokens that the model has embeddings of.
        :param text_padding: whether texts are padded to the longest of a batch, or all to the longest there can be.
        :raises ModelLoadError: a file is missing or broken, or the tokenizer does not fit the model.
        """
        settings, folder = find_settings(folder)
        # Without a length of its own, a folder's tokenizer says it, as in sentence-transformers.
        wanted = max_length or settings.max_length

        text = image = None
        if "text" in modalities:
            text = TextProcessor.load(
                folder,
                max_length=wanted,
                model_max_length=model_max_length,
                vocab_size=vocab_size,
                do_lower_case=settings.do_lower_case,
                padding=text_padding,
                open_clip=OpenClipTexts(
                    text_cleaning=settings.text_cleaning,
                    open_clip_bpe=settings.open_clip_bpe,
                    strip_sep_token=settings.strip_sep_token,
                ),
            )
            settings.max_length = text.max_length

        if "image" in modalities:
            image = ImageProcessor.load(folder)

        return TowerProcessor(text, image, settings, tokens_per_image=tokens_per_image, text_padding=text_padding)


def find_settings(folder: Path) -> tuple[ProcessorSettings, Path]:
    """Return the settings, and the folder with the tokenizer's and the image processor's files."""
    if (settings := read_settings(folder)) is not None:
        return settings, folder

    opened = ModelFolder.maybe_open(folder)
    if opened is None:
        return ProcessorSettings(), folder

    settings = ProcessorSettings(**opened.text_options())
    if opened.dialect is None and reads_lower_case(opened.backbone):
        settings.do_lower_case = True

    return settings, opened.backbone

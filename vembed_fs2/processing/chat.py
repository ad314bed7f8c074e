"""The processor of models that read a row as a conversation: texts and images in their order, in a chat template."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from typing_extensions import override

from vembed_fs2.data.decode import decode_image
from vembed_fs2.data.example import Image, Item, Role, Text
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.inputs import ImageInputs, TextInputs
from vembed_fs2.errors import DataError, ModelLoadError
from vembed_fs2.processing.processor import Processor
from vembed_fs2.processing.settings import ProcessorSettings, save_settings
from vembed_fs2.processing.text import TextProcessor, mask_tokens, pad_ids

NO_INPUT: Final = "NULL"
"""What an input without a text and an image says, as in Qwen3-VL-Embedding."""

_OTHER_FILES: Final = ("video_preprocessor_config.json", "processor_config.json")
"""Files of transformers' processors that are kept as they are."""


@dataclass(frozen=True)
class PreparedChat:
    """An input whose images are patches."""

    item: Item

    patches: tuple[Tensor, ...]
    """The patches of each image. *Shape:* ``[S, K]``."""

    grids: tuple[tuple[int, int, int], ...]
    """The patches of each image over time, height and width."""


@final
class ChatProcessor(Processor[PreparedChat]):
    """Puts an input into the model's chat template, with a placeholder for each token of an image.

    The system's part of the conversation is the instruction: the row's own, else
    the prompt, else the model's default. An input that is too long loses the end
    of its last text; the template and the tokens of images stay.
    """

    def __init__(
        self,
        text: TextProcessor,
        image: Any,
        settings: ProcessorSettings,
        *,
        image_token: str,
        before: str,
        after: str,
        default_instruction: str,
        folder: Path | None = None,
    ) -> None:
        """
        :param image: an image processor of transformers that makes patches of an image of any size.
        :param image_token: the placeholder for a token of an image.
        :param before: the token before an image in the template.
        :param after: the token after it.
        :param default_instruction: the instruction of an input that has none.
        :param folder: a folder of the model, whose other files are saved as well.
        """
        super().__init__(settings)

        self.text = text
        self.image = image
        self.image_token = image_token
        self.before = before
        self.after = after
        self.default_instruction = default_instruction
        self._folder = folder

    @override
    def prepare(self, item: Item) -> PreparedChat:
        try:
            patches, grids = [], []
            for source in item.images:
                image = decode_image(source, root=self.image_root, allow_urls=self.allow_urls)
                values, grid = self._cut(image)
                patches.append(values)
                grids.append(grid)

            prepared = PreparedChat(item, tuple(patches), tuple(grids))
            if grids:
                # Here, where only this input is lost if its images alone are too long. Its texts can be cut.
                self._tokenize(prepared, self.default_instruction, [""] * len(_texts_of(item)))
        except DataError as ex:
            raise DataError(f"{item.source}: {ex}" if item.source else str(ex)) from ex

        return prepared

    def _cut(self, image: PILImage.Image) -> tuple[Tensor, tuple[int, int, int]]:
        """Resize an image and cut it into patches. *Returns:* ``[S, K]``, and how many there are in each direction."""
        budget = {"min_pixels": self.settings.min_pixels, "max_pixels": self.settings.max_pixels}
        given = {name: value for name, value in budget.items() if value is not None}
        try:
            found = self.image(images=[image.convert("RGB")], return_tensors="np", **given)
        except ValueError as ex:  # For an image that is hundreds of times longer than it is wide.
            raise DataError(f"An image of {image.width} x {image.height} pixels cannot be prepared: {ex}.") from None

        frames, height, width = np.asarray(found["image_grid_thw"])[0].tolist()
        return torch.from_numpy(np.asarray(found["pixel_values"], dtype=np.float32)), (frames, height, width)

    @override
    def collate(
        self, prepared: Sequence[PreparedChat], *, role: Role | None = None, prompt: str | None = None
    ) -> EncoderBatch:
        if prompt is None:
            prompt = self.prompt_for(role)

        ids = [
            self._tokenize(p, p.item.instruction or prompt or self.default_instruction, _texts_of(p.item))
            for p in prepared
        ]
        width = max((len(row) for row in ids), default=0)
        input_ids = pad_ids(ids, width, self.text.tokenizer.pad_token_id or 0)
        mask = mask_tokens(torch.tensor([len(row) for row in ids], dtype=torch.int64), width)
        text = TextInputs(input_ids, torch.arange(len(ids)), mask)

        return EncoderBatch(len(prepared), text, self._collate_images(prepared))

    def _collate_images(self, prepared: Sequence[PreparedChat]) -> ImageInputs | None:
        patches = [patches for p in prepared for patches in p.patches]
        if not patches:
            return None

        rows = torch.tensor([row for row, p in enumerate(prepared) for _ in p.patches])
        grids = torch.tensor([grid for p in prepared for grid in p.grids])
        return ImageInputs(torch.cat(patches), rows, grids)

    def _tokenize(self, prepared: PreparedChat, instruction: str, texts: list[str]) -> list[int]:
        """Return the token ids of an input, at most ``max_length``.

        :param texts: the texts of the input; they are cut in place.
        :raises DataError: the template and the images alone are longer.
        """
        limit = self.text.max_length

        while True:
            ids = self.text.encode(self._render(prepared, texts, instruction))
            if limit is None or len(ids) <= limit:
                return ids

            place = next((i for i in reversed(range(len(texts))) if texts[i]), None)
            if place is None:
                raise DataError(self._describe_excess(prepared, len(ids), limit))
            texts[place] = self.text.cut(texts[place], len(ids) - limit)

    def _describe_excess(self, prepared: PreparedChat, length: int, limit: int) -> str:
        merge = self.image.merge_size
        size = self.image.patch_size
        images = sum(self._num_tokens(grid) for grid in prepared.grids)
        sizes = ", ".join(f"{grid[2] * size} x {grid[1] * size}" for grid in prepared.grids)
        return (
            f"An input has {length} tokens without its text, {images} of them for images of {sizes} pixels, but the"
            f" model takes {limit}. Lower `max_pixels` (a token is {(size * merge) ** 2} pixels), or raise"
            " `max_length`."
        )

    def _num_tokens(self, grid: tuple[int, int, int]) -> int:
        merge_size: int = self.image.merge_size
        return grid[0] * grid[1] * grid[2] // merge_size**2

    def _render(self, prepared: PreparedChat, texts: Sequence[str], instruction: str) -> str:
        """Write an input as the model's template wants it."""
        content: list[dict[str, str]] = []
        rest = iter(texts)
        for part in prepared.item.parts:
            if isinstance(part, Image):
                content.append({"type": "image"})
            elif text := next(rest):
                content.append({"type": "text", "text": self._escape(text)})
        if not content:
            content.append({"type": "text", "text": NO_INPUT})

        conversation = [
            {"role": "system", "content": [{"type": "text", "text": self._escape(with_full_stop(instruction))}]},
            {"role": "user", "content": content},
        ]
        rendered: str = self.text.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )

        one = f"{self.before}{self.image_token}{self.after}"
        pieces = rendered.split(one)
        if len(pieces) != len(prepared.grids) + 1:
            raise DataError(f"The chat template of the model writes {len(pieces) - 1} of {len(prepared.grids)} images.")

        many = [f"{self.before}{self.image_token * self._num_tokens(grid)}{self.after}" for grid in prepared.grids]
        return "".join(piece + image for piece, image in zip(pieces, [*many, ""]))

    def _escape(self, text: str) -> str:
        """Keep the placeholder of an image out of a text: it would be an image that is not there."""
        return text.replace(self.image_token, self.image_token[:2] + " " + self.image_token[2:])

    @override
    def save(self, folder: Path) -> None:
        self.text.save(folder)
        self.image.save_pretrained(folder)
        for name in _OTHER_FILES:
            if self._folder is not None and (file := self._folder / name).is_file() and self._folder != folder:
                shutil.copyfile(file, folder / name)

        save_settings(self.settings, folder)


def _texts_of(item: Item) -> list[str]:
    return [part.value for part in item.parts if isinstance(part, Text)]


def with_full_stop(instruction: str) -> str:
    """End a sentence with a full stop, unless punctuation ends it already."""
    instruction = instruction.strip()
    ends = bool(instruction) and unicodedata.category(instruction[-1]).startswith("P")
    return instruction if ends else f"{instruction}."


def load_chat_processor(
    folder: Path,
    settings: ProcessorSettings,
    create_image_processor: Callable[[dict[str, Any]], Any],
    *,
    max_length: int | None,
    model_max_length: int | None,
    vocab_size: int | None,
    placeholders: tuple[int, int, int],
    default_instruction: str,
    default_template: str,
) -> ChatProcessor:
    """Load what a folder says.

    :param create_image_processor: makes an image processor of transformers of the content of its file.
    :param max_length: overrides the folder's longest input, in tokens.
    :param model_max_length: the longest input that the model can take at all.
    :param vocab_size: the number of tokens that the model has embeddings of.
    :param placeholders: the ids of the token of an image, and of those before and after an image.
    :param default_template: the chat template, if the folder has none.
    :raises ModelLoadError: a file is missing or broken.
    """
    from vembed_fs2.processing.image import read_image_config

    text = TextProcessor.load(
        folder,
        max_length=max_length or settings.max_length,
        model_max_length=model_max_length,
        vocab_size=vocab_size,
    )
    settings.max_length = text.max_length

    tokenizer = text.tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = default_template

    names = tokenizer.convert_ids_to_tokens(list(placeholders))
    if None in names:
        raise ModelLoadError(
            f"The tokenizer in {folder} lacks the tokens {list(placeholders)}, which stand for images."
        )

    file, values = read_image_config(folder)
    try:
        image = create_image_processor(values)
    except (TypeError, ValueError) as ex:
        raise ModelLoadError(f"{file} is not a valid image processor: {ex}") from ex

    return ChatProcessor(
        text,
        image,
        settings,
        image_token=names[0],
        before=names[1],
        after=names[2],
        default_instruction=default_instruction,
        folder=folder,
    )

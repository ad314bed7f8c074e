"""What encoders read: rows of texts, images and features.

Shapes: N rows, T texts, P images, L tokens, S patches, K values of a patch, C x H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from warnings import warn

import torch
from torch import Tensor

from vembed_fs2.embedding.inputs import FeatureInputs, ImageInputs, Kind, TextInputs, as_mask


class Profile(NamedTuple):
    """What it takes to encode each row; what chunks are planned by."""

    kinds: list[int]
    """What each row holds (:class:`~vembed_fs2.embedding.inputs.Kind`). Rows of different kinds never share a chunk."""

    tokens: list[int]
    """The tokens (and steps of features) of each row. A chunk is padded to the most that one of its rows has."""

    patches: list[int]
    """The patches of each row's images. A chunk holds the sum of them."""

    def costs(self) -> list[int]:
        """The tokens and patches of each row."""
        return [tokens + patches for tokens, patches in zip(self.tokens, self.patches)]


@dataclass(eq=False)
class EncoderBatch:
    """The inputs of ``num_rows`` rows for one encoder.

    A row holds any number of texts, images and feature sequences (at least one
    of these). For encoders that read a row's texts and images together, the
    token ids hold placeholders for the row's images, in the order of the images.
    """

    num_rows: int

    text: TextInputs | None = None

    images: ImageInputs | None = None

    features: FeatureInputs | None = None

    @staticmethod
    def of_text(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pooling_mask: Tensor | None = None,
    ) -> EncoderBatch:
        """Make a batch of one text per row. See :meth:`TextInputs.from_padded`.

        :raises ValueError: a mask is not valid.
        """
        text = TextInputs.from_padded(input_ids, attention_mask, token_type_ids, pooling_mask)
        return EncoderBatch(len(text), text)

    @staticmethod
    def of_images(pixel_values: Tensor, tokens_per_image: int = 1) -> EncoderBatch:
        """Make a batch of one image per row.

        :param pixel_values: *Shape:* ``[P, C, H, W]``.
        """
        rows = torch.arange(pixel_values.size(0), device=pixel_values.device)
        images = ImageInputs(pixel_values, rows, tokens_per_image=tokens_per_image)
        return EncoderBatch(len(images), images=images)

    @staticmethod
    def of_patches(patches: Tensor, mask: Tensor, shapes: Tensor) -> EncoderBatch:
        """Make a batch of one image per row, cut into patches.

        :param patches: *Shape:* ``[P, S, K]``.
        :param mask: True for patches, False for padding (on the right). *Shape:* ``[P, S]``.
        :param shapes: how many rows and columns of patches each image has. *Shape:* ``[P, 2]``.
        """
        grids = torch.cat([torch.ones_like(shapes[:, :1]), shapes], dim=1)
        images = ImageInputs(patches[as_mask(mask, "mask")], torch.arange(len(shapes), device=patches.device), grids)
        return EncoderBatch(len(images), images=images)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def device(self) -> torch.device:
        """The device that holds the inputs."""
        return next((part.rows.device for _, part in self._parts()), torch.device("cpu"))

    @property
    def num_texts(self) -> int:
        return 0 if self.text is None else len(self.text)

    @property
    def num_images(self) -> int:
        return 0 if self.images is None else len(self.images)

    def profile(self) -> Profile:
        """Return what each row holds, and what it costs to encode."""
        kinds, tokens, patches = torch.zeros(3, self.num_rows, dtype=torch.int64)

        if self.text is not None:
            tokens.index_add_(0, self.text.rows.cpu(), self.text.num_tokens().cpu())
        if self.features is not None:
            tokens.index_add_(0, self.features.rows.cpu(), self.features.num_steps().cpu())
        if self.images is not None:
            patches.index_add_(0, self.images.rows.cpu(), self.images.num_patches())

        for kind, part in self._parts():
            kinds[part.rows.cpu()] |= int(kind)

        return Profile(kinds.tolist(), tokens.tolist(), patches.tolist())

    def select(self, rows: Sequence[int]) -> EncoderBatch:
        """Return the given rows, in that order, without padding that they do not need.

        :raises ValueError: a row is asked for twice.
        """
        if len(set(rows)) != len(rows):
            raise ValueError("`rows` must not name a row twice.")

        position = torch.full((self.num_rows,), -1, dtype=torch.int64)
        position[list(rows)] = torch.arange(len(rows))

        def members(part: Any) -> Any:
            if part is None:
                return None
            index, new_rows = _members(part.rows, position)
            return part.select(index, new_rows) if index.numel() > 0 else None

        return EncoderBatch(len(rows), members(self.text), members(self.images), members(self.features))

    @staticmethod
    def concat(batches: Sequence[EncoderBatch]) -> EncoderBatch:
        """Append batches (at least one); texts and features are padded to the longest."""
        if len(batches) == 1:
            return batches[0]

        joined: dict[str, Any] = {}
        for name, kls in (("text", TextInputs), ("images", ImageInputs), ("features", FeatureInputs)):
            parts, rows, offset = [], [], 0
            for batch in batches:
                part: Any = getattr(batch, name)
                if part is not None:
                    parts.append(part)
                    rows.append(part.rows + offset)
                offset += batch.num_rows

            if parts:
                joined[name] = kls.concat(parts, torch.cat(rows))

        return EncoderBatch(sum(batch.num_rows for batch in batches), **joined)

    def cut(self) -> tuple[EncoderBatch, list[tuple[Tensor, Tensor]]]:
        """Cut the graph that made the images and features, for the gradient cache.

        :returns: the same rows, and each tensor that needs a gradient with the leaf that takes its place.
        """
        links: list[tuple[Tensor, Tensor]] = []

        def cut_part(part: Any) -> Any:
            if part is None or not part.values.requires_grad:
                return part
            links.append((part.values, part.values.detach().requires_grad_()))
            return replace(part, values=links[-1][1])

        return EncoderBatch(self.num_rows, self.text, cut_part(self.images), cut_part(self.features)), links

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move all tensors in place (fairseq2's ``SupportsDeviceTransfer``), but the grids of images."""
        for _, part in self._parts():
            part.to(device, non_blocking=non_blocking)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in _FLAT_NAMES:
                raise AttributeError(f"'EncoderBatch' object has no attribute '{name}'")

            part, attribute = _FLAT_NAMES[name]
            warn(f"`batch.{name}` is deprecated: use `batch.{part}.{attribute}`.", DeprecationWarning, stacklevel=2)
            return getattr(getattr(self, part), attribute, _ABSENT.get(name))

        def __setattr__(self, name: str, value: Any) -> None:
            if name in _FLAT_NAMES:
                part, attribute = _FLAT_NAMES[name]
                raise AttributeError(f"`batch.{name}` cannot be set any more: set `batch.{part}.{attribute}`.")
            object.__setattr__(self, name, value)

    def _parts(self) -> Iterator[tuple[Kind, Any]]:
        for kind, part in ((Kind.TEXT, self.text), (Kind.IMAGE, self.images), (Kind.FEATURES, self.features)):
            if part is not None:
                yield kind, part


_FLAT_NAMES: Final = {
    "input_ids": ("text", "input_ids"),
    "attention_mask": ("text", "attention_mask"),
    "token_type_ids": ("text", "token_type_ids"),
    "pooling_mask": ("text", "pooling_mask"),
    "text_rows": ("text", "rows"),
    "pixel_values": ("images", "values"),
    "image_rows": ("images", "rows"),
    "patch_mask": ("images", "patch_mask"),
    "spatial_shapes": ("images", "spatial_shapes"),
    "tokens_per_image": ("images", "tokens_per_image"),
    "fixed_width": ("text", "fixed_width"),
}
"""The names that the inputs had before texts and images became parts of their own."""

_ABSENT: Final = {"tokens_per_image": 0, "fixed_width": False}
"""The values that they had in a batch without texts or images; others had ``None``."""


def _members(rows: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Which members belong to the selected rows, and their new rows, ordered by row."""
    new_rows = position.to(rows.device)[rows]
    index = torch.nonzero(new_rows >= 0).squeeze(1)
    index = index[torch.argsort(new_rows[index], stable=True)]
    return index, new_rows[index]

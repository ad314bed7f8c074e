"""The parts of a batch: texts, images and sequences of features.

Each part knows which row its members belong to, and can count, select, append
and move itself.

Shapes: N rows, T texts, P images, F feature sequences, L tokens, S patches or
steps, K values of a patch or step, C x H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self


class Kind(IntFlag):
    """What a row holds. Rows of different kinds never share a chunk, because they run different parts of a model."""

    TEXT = 1
    IMAGE = 2
    FEATURES = 4

    def describe(self) -> str:
        """Name what the row holds: "texts and images"."""
        names = {Kind.TEXT: "texts", Kind.IMAGE: "images", Kind.FEATURES: "features"}
        return " and ".join(name for kind, name in names.items() if kind in self) or "nothing"


class Inputs(Protocol):
    """What the parts of a batch have in common."""

    rows: Tensor
    """The row of each member. int64."""

    def __len__(self) -> int: ...

    def select(self, index: Tensor, rows: Tensor) -> Self:
        """Return the members ``index``, which then belong to ``rows``, without padding that they do not need."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move all tensors in place."""


@dataclass(eq=False)
class TextInputs:
    """Tokenized texts, padded on the right."""

    input_ids: Tensor
    """*Shape:* ``[T, L]``, int64."""

    rows: Tensor
    """The row of each text. *Shape:* ``[T]``, int64."""

    attention_mask: Tensor | None = None
    """
    True for tokens, False for padding; ``None`` if nothing is masked. A mask of
    numbers becomes one: every value but 0 marks a token. *Shape:* ``[T, L]``, bool.
    """

    token_type_ids: Tensor | None = None
    """Segment ids. *Shape:* ``[T, L]``, int64."""

    pooling_mask: Tensor | None = None
    """True for tokens that pooling looks at, if these differ from ``attention_mask``. *Shape:* ``[T, L]``, bool."""

    fixed_width: bool = False
    """If ``True``, texts keep their padding: the model reads it, though it may be masked."""

    def __post_init__(self) -> None:
        for name in ("attention_mask", "pooling_mask"):
            mask = getattr(self, name)
            if mask is not None:
                setattr(self, name, as_mask(mask, name))

    @staticmethod
    def from_padded(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pooling_mask: Tensor | None = None,
    ) -> TextInputs:
        """Take texts that are padded on either side; padding on the left is moved to the right.

        :raises ValueError: a mask has another shape than ``input_ids``, or values
            that are negative or NaN. Every other value but 0 marks a token.
        """
        for name, mask in (("attention_mask", attention_mask), ("pooling_mask", pooling_mask)):
            if mask is not None and mask.shape != input_ids.shape:
                found, expected = list(mask.shape), list(input_ids.shape)
                raise ValueError(f"`{name}` must be of the shape of `input_ids`, {expected}, but is {found}.")

        rows = torch.arange(input_ids.size(0), device=input_ids.device)

        inputs = TextInputs(input_ids, rows, attention_mask, token_type_ids, pooling_mask)

        mask = inputs.attention_mask
        if mask is not None and (mask[:, 1:] & ~mask[:, :-1]).any():
            order = torch.argsort(~mask, dim=1, stable=True)
            for name in _TEXT_FIELDS:
                value = getattr(inputs, name)
                setattr(inputs, name, None if value is None else value.gather(1, order))

        return inputs

    def __len__(self) -> int:
        return self.input_ids.size(0)

    @property
    def pooled_tokens(self) -> Tensor | None:
        """True for the tokens that pooling looks at; ``None`` means all. *Shape:* ``[T, L]``, bool."""
        return self.attention_mask if self.pooling_mask is None else self.pooling_mask

    def num_tokens(self) -> Tensor:
        """Count the tokens of each text, and its padding if the model reads that. *Shape:* ``[T]``."""
        if self.attention_mask is None or self.fixed_width:
            return torch.full((len(self),), self.input_ids.size(1), device=self.input_ids.device)
        return self.attention_mask.sum(1)

    def select(self, index: Tensor, rows: Tensor) -> TextInputs:
        width = self.input_ids.size(1) if self.fixed_width else _width(self.attention_mask, index, self.input_ids)

        def chosen(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index, :width]

        masks = (chosen(self.attention_mask), chosen(self.token_type_ids), chosen(self.pooling_mask))
        return TextInputs(self.input_ids[index, :width], rows, *masks, fixed_width=self.fixed_width)

    @staticmethod
    def concat(parts: Sequence[TextInputs], rows: Tensor) -> TextInputs:
        """Append texts, padded to the longest; ``rows`` are the rows of all."""
        widths = [part.input_ids.size(1) for part in parts]
        width = max(widths)

        joined: dict[str, Tensor | None] = {}
        for name in _TEXT_FIELDS:
            needs_mask = name == "attention_mask" and min(widths) < width
            if all(getattr(part, name) is None for part in parts) and not needs_mask:
                joined[name] = None
                continue

            values = [part._value_or_default(name) for part in parts]
            joined[name] = torch.cat([pad(value, (0, width - value.size(1))) for value in values])

        ids = joined.pop("input_ids")
        assert ids is not None
        return TextInputs(ids, rows, **joined, fixed_width=any(part.fixed_width for part in parts))

    def _value_or_default(self, name: str) -> Tensor:
        value: Tensor | None = getattr(self, name)
        if value is not None:
            return value
        if name == "token_type_ids":
            return torch.zeros_like(self.input_ids)
        if name == "pooling_mask" and self.attention_mask is not None:
            return self.attention_mask

        return torch.ones_like(self.input_ids, dtype=torch.bool)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        _move(self, (*_TEXT_FIELDS, "rows"), device, non_blocking)


@dataclass(eq=False)
class ImageInputs:
    """Preprocessed images of one size, or images and videos of any size as patches, one after the other."""

    values: Tensor
    """Pixels ``[P, C, H, W]``, or the patches of all images ``[sum of S, K]``; float."""

    rows: Tensor
    """The row of each image. *Shape:* ``[P]``, int64."""

    grids: Tensor | None = None
    """
    The number of patches over time, height and width, if images are patches. It
    stays on the CPU: models work out positions from it. *Shape:* ``[P, 3]``, int64.
    """

    tokens_per_image: int = 1
    """How many tokens the model makes of an image, if images are pixels; for planning chunks."""

    def __post_init__(self) -> None:
        if self.grids is not None:
            self.grids = self.grids.cpu()

    def __len__(self) -> int:
        return self.values.size(0) if self.grids is None else self.grids.size(0)

    def num_patches(self) -> Tensor:
        """Count the patches of each image. *Shape:* ``[P]``, on the CPU."""
        if self.grids is None:
            return torch.full((len(self),), max(self.tokens_per_image, 1))
        return self.grids.prod(1)

    @property
    def patch_mask(self) -> Tensor | None:
        """True for patches of padded images, see :meth:`pad_patches`; ``None`` if images are pixels. ``[P, S]``."""
        return None if self.grids is None else self.pad_patches()[1]

    @property
    def spatial_shapes(self) -> Tensor | None:
        """The rows and columns of patches of each image; ``None`` if images are pixels. ``[P, 2]``, on the CPU."""
        return None if self.grids is None else self.grids[:, 1:]

    def pad_patches(self) -> tuple[Tensor, Tensor]:
        """Pad to the most patches of an image: return ``[P, S, K]`` and a mask ``[P, S]``, True for patches."""
        lengths = self.num_patches()
        mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(self.values.device)

        padded = self.values.new_zeros(*mask.shape, self.values.size(1))
        padded[mask] = self.values

        return padded, mask

    def select(self, index: Tensor, rows: Tensor) -> ImageInputs:
        if self.grids is None:
            return ImageInputs(self.values[index], rows, None, self.tokens_per_image)

        chosen = index.cpu()
        lengths = self.num_patches()
        starts = (lengths.cumsum(0) - lengths)[chosen]
        lengths = lengths[chosen]

        # The position of each patch: counted within its image, from where the image starts.
        within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        patches = (starts.repeat_interleave(lengths) + within).to(self.values.device)

        return ImageInputs(self.values[patches], rows, self.grids[chosen], self.tokens_per_image)

    @staticmethod
    def concat(parts: Sequence[ImageInputs], rows: Tensor) -> ImageInputs:
        """Append images; ``rows`` are the rows of all.

        :raises ValueError: some are pixels and some are patches.
        """
        grids = [part.grids for part in parts if part.grids is not None]
        if 0 < len(grids) < len(parts):
            raise ValueError("Images as pixels and images as patches cannot be in one batch.")

        return ImageInputs(
            torch.cat([part.values for part in parts]),
            rows,
            torch.cat(grids) if grids else None,
            max(part.tokens_per_image for part in parts),
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        _move(self, ("values", "rows"), device, non_blocking)


@dataclass(eq=False)
class FeatureInputs:
    """Sequences of continuous features, padded on the right."""

    values: Tensor
    """*Shape:* ``[F, S, K]``, float."""

    rows: Tensor
    """The row of each sequence. *Shape:* ``[F]``, int64."""

    mask: Tensor | None = None
    """True for steps, False for padding; ``None`` if there is no padding. *Shape:* ``[F, S]``, bool."""

    def __post_init__(self) -> None:
        if self.mask is not None:
            self.mask = as_mask(self.mask, "mask")

    def __len__(self) -> int:
        return self.values.size(0)

    def num_steps(self) -> Tensor:
        """Count the steps of each sequence. *Shape:* ``[F]``."""
        if self.mask is None:
            return torch.full((len(self),), self.values.size(1), device=self.values.device)
        return self.mask.sum(1)

    def select(self, index: Tensor, rows: Tensor) -> FeatureInputs:
        width = _width(self.mask, index, self.values)
        mask = None if self.mask is None else self.mask[index, :width]
        return FeatureInputs(self.values[index, :width], rows, mask)

    @staticmethod
    def concat(parts: Sequence[FeatureInputs], rows: Tensor) -> FeatureInputs:
        """Append sequences, padded to the longest; ``rows`` are the rows of all."""
        width = max(part.values.size(1) for part in parts)

        mask = None
        if any(part.mask is not None or part.values.size(1) < width for part in parts):
            masks = (
                part.values.new_ones(part.values.shape[:2], dtype=torch.bool) if part.mask is None else part.mask
                for part in parts
            )
            mask = torch.cat([pad(m, (0, width - m.size(1))) for m in masks])

        values = torch.cat([pad(part.values, (0, 0, 0, width - part.values.size(1))) for part in parts])
        return FeatureInputs(values, rows, mask)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        _move(self, ("values", "mask", "rows"), device, non_blocking)


_TEXT_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "pooling_mask")


def as_mask(mask: Tensor, name: str) -> Tensor:
    """Return a mask as bool: every value but 0 counts.

    :raises ValueError: there are values that are negative or NaN: a mask that is
        added to attention scores means the opposite.
    """
    if mask.dtype == torch.bool:
        return mask

    if not (mask >= 0).all():
        raise ValueError(
            f"`{name}` has values that are negative or NaN. It must hold 0 for what is left out and other values for"
            " what counts; convert a mask that is added to attention scores with `mask == 0`."
        )

    return mask != 0


def _width(mask: Tensor | None, index: Tensor, values: Tensor) -> int:
    """The longest of the selected sequences."""
    return values.size(1) if mask is None else int(mask[index].sum(1).max())


def _move(part: object, names: Sequence[str], device: torch.device, non_blocking: bool) -> None:
    for name in names:
        value = getattr(part, name)
        if value is not None:
            setattr(part, name, value.to(device, non_blocking=non_blocking))

"""What encoders read: rows of texts and images.

Shapes: N rows, T texts, P images, L tokens, S patches, K values of a patch, C x H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass
class EncoderBatch:
    """The inputs of ``num_rows`` rows for one encoder.

    A row holds any number of texts and images (at least one of either);
    ``text_rows`` and ``image_rows`` say which row each one belongs to.
    """

    num_rows: int

    input_ids: Tensor | None = None
    """Token ids, padded on the right. *Shape:* ``[T, L]``, int64."""

    attention_mask: Tensor | None = None
    """
    True for tokens, False for padding; ``None`` if nothing is masked. A mask of
    numbers becomes one: every value but 0 marks a token. *Shape:* ``[T, L]``, bool.
    """

    token_type_ids: Tensor | None = None
    """Segment ids. *Shape:* ``[T, L]``, int64."""

    pooling_mask: Tensor | None = None
    """True for tokens that pooling looks at, where that differs from ``attention_mask``. *Shape:* ``[T, L]``."""

    text_rows: Tensor | None = None
    """The row of each text. *Shape:* ``[T]``, int64."""

    pixel_values: Tensor | None = None
    """Preprocessed images. *Shape:* ``[P, C, H, W]``, float; ``[P, S, K]`` if they are cut into patches."""

    image_rows: Tensor | None = None
    """The row of each image. *Shape:* ``[P]``, int64."""

    tokens_per_image: int = 0
    """The cost of an image in tokens (its number of patches), for planning chunks."""

    patch_mask: Tensor | None = None
    """True for patches, False for padding (on the right), of images cut into patches. *Shape:* ``[P, S]``, bool."""

    spatial_shapes: Tensor | None = None
    """
    How many rows and columns of patches an image has, if it is cut into patches.
    It stays on the CPU: models work out positions from it. *Shape:* ``[P, 2]``, int64.
    """

    fixed_width: bool = False
    """If ``True``, texts keep their padding: the model reads it, though it may be masked."""

    def __post_init__(self) -> None:
        for name in ("attention_mask", "pooling_mask", "patch_mask"):
            mask = getattr(self, name)
            if mask is not None:
                setattr(self, name, as_mask(mask, name))

    @staticmethod
    def of_text(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pooling_mask: Tensor | None = None,
    ) -> EncoderBatch:
        """Make a batch of one text per row. Padding on the left is moved to the right.

        :raises ValueError: a mask is not of the shape of ``input_ids``, or has
            values that are negative or NaN, as masks have that are added to
            attention scores. Every other value but 0 marks a token.
        """
        for name, mask in (("attention_mask", attention_mask), ("pooling_mask", pooling_mask)):
            if mask is not None and mask.shape != input_ids.shape:
                found, expected = list(mask.shape), list(input_ids.shape)
                raise ValueError(f"`{name}` must be of the shape of `input_ids`, {expected}, but is {found}.")
        attention_mask = None if attention_mask is None else as_mask(attention_mask, "attention_mask")
        masks = (attention_mask, token_type_ids, pooling_mask)
        input_ids, mask, types, pooling = _pad_right(input_ids, *masks)
        rows = torch.arange(input_ids.size(0), device=input_ids.device)
        return EncoderBatch(input_ids.size(0), input_ids, mask, types, pooling, rows)

    @staticmethod
    def of_images(pixel_values: Tensor, tokens_per_image: int = 0) -> EncoderBatch:
        """Make a batch of one image per row."""
        rows = torch.arange(pixel_values.size(0), device=pixel_values.device)
        return EncoderBatch(
            pixel_values.size(0), pixel_values=pixel_values, image_rows=rows, tokens_per_image=tokens_per_image
        )

    @staticmethod
    def of_patches(pixel_values: Tensor, patch_mask: Tensor, spatial_shapes: Tensor) -> EncoderBatch:
        """Make a batch of one image per row, cut into patches; see the fields for the shapes."""
        batch = EncoderBatch.of_images(pixel_values)
        batch.patch_mask, batch.spatial_shapes = as_mask(patch_mask, "patch_mask"), spatial_shapes.cpu()
        return batch

    @property
    def num_texts(self) -> int:
        return 0 if self.input_ids is None else self.input_ids.size(0)

    @property
    def num_images(self) -> int:
        return 0 if self.pixel_values is None else self.pixel_values.size(0)

    def text_lengths(self) -> Tensor:
        """The number of tokens of each text, with the padding that is read. *Shape:* ``[T]``."""
        assert self.input_ids is not None
        if self.attention_mask is None or self.fixed_width:
            return torch.full((self.num_texts,), self.input_ids.size(1), device=self.input_ids.device)
        return self.attention_mask.sum(1)

    def pooled_tokens(self) -> Tensor | None:
        """True for the tokens that pooling looks at; ``None`` means all. *Shape:* ``[T, L]``."""
        return self.attention_mask if self.pooling_mask is None else self.pooling_mask

    def image_lengths(self) -> Tensor:
        """The cost of each image in tokens. *Shape:* ``[P]``."""
        if self.patch_mask is None:
            return torch.full((self.num_images,), max(self.tokens_per_image, 1))
        return self.patch_mask.sum(1)

    def __len__(self) -> int:
        return self.num_rows

    def costs(self) -> list[int]:
        """The tokens of each row, those of its images included: what it costs to encode."""
        cost = torch.zeros(self.num_rows, dtype=torch.int64)
        if self.input_ids is not None and self.text_rows is not None:
            cost.index_add_(0, self.text_rows.cpu(), self.text_lengths().cpu())
        if self.image_rows is not None:
            cost.index_add_(0, self.image_rows.cpu(), self.image_lengths().cpu())
        return [int(c) for c in cost]

    def kinds(self) -> list[int]:
        """Which encoders each row needs: 1 text, 2 image, 3 both. Rows of a kind share chunks."""
        kind = torch.zeros(self.num_rows, dtype=torch.int64)
        if self.text_rows is not None:
            kind[self.text_rows.cpu()] |= 1
        if self.image_rows is not None:
            kind[self.image_rows.cpu()] |= 2
        return [int(k) for k in kind]

    def select(self, rows: Sequence[int]) -> EncoderBatch:
        """Return the given rows, in that order, without padding that they do not need.

        :raises ValueError: a row is asked for twice.
        """
        if len(set(rows)) != len(rows):
            raise ValueError("`rows` must not name a row twice.")
        position = torch.full((self.num_rows,), -1, dtype=torch.int64)
        position[list(rows)] = torch.arange(len(rows))
        batch = EncoderBatch(len(rows), tokens_per_image=self.tokens_per_image, fixed_width=self.fixed_width)
        if self.input_ids is not None and self.text_rows is not None:
            batch._select_texts(self, *_members(self.text_rows, position))
        if self.pixel_values is not None and self.image_rows is not None:
            batch._select_images(self, *_members(self.image_rows, position))
        return batch

    def _select_texts(self, source: EncoderBatch, index: Tensor, rows: Tensor) -> None:
        if index.numel() == 0:
            return
        assert source.input_ids is not None
        width = source.input_ids.size(1)
        if source.attention_mask is not None and not source.fixed_width:
            width = int(source.attention_mask[index].sum(1).max())
        for name in _TEXT_FIELDS:
            value = getattr(source, name)
            if value is not None:
                setattr(self, name, value[index, :width])
        self.text_rows = rows

    def _select_images(self, source: EncoderBatch, index: Tensor, rows: Tensor) -> None:
        if index.numel() == 0:
            return
        assert source.pixel_values is not None
        self.pixel_values, self.image_rows = source.pixel_values[index], rows
        if source.patch_mask is not None and source.spatial_shapes is not None:
            mask = source.patch_mask[index]
            width = int(mask.sum(1).max())
            self.pixel_values, self.patch_mask = self.pixel_values[:, :width], mask[:, :width]
            self.spatial_shapes = source.spatial_shapes[index.cpu()]

    @staticmethod
    def concat(batches: Sequence[EncoderBatch]) -> EncoderBatch:
        """Append batches (at least one); texts and patches are padded to the longest."""
        if len(batches) == 1:
            return batches[0]
        out = EncoderBatch(
            sum(b.num_rows for b in batches),
            tokens_per_image=max(b.tokens_per_image for b in batches),
            fixed_width=any(b.fixed_width for b in batches),
        )
        offsets = [sum(b.num_rows for b in batches[:i]) for i in range(len(batches))]
        for name in ("text_rows", "image_rows"):
            rows = [getattr(b, name) + o for b, o in zip(batches, offsets) if getattr(b, name) is not None]
            setattr(out, name, torch.cat(rows) if rows else None)
        _concat_images(out, [b for b in batches if b.pixel_values is not None])
        _concat_texts(out, [b for b in batches if b.input_ids is not None])
        return out

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        """Move all tensors in place (fairseq2's ``SupportsDeviceTransfer``), but ``spatial_shapes``."""
        for name in (*_TEXT_FIELDS, "text_rows", "pixel_values", "patch_mask", "image_rows"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device, non_blocking=non_blocking))

    def copy(self) -> EncoderBatch:
        """A shallow copy: the same tensors."""
        return replace(self)


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


_TEXT_FIELDS = ("input_ids", "attention_mask", "token_type_ids", "pooling_mask")


def _pad_right(ids: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    mask = others[0]
    if mask is None:
        return ids, None, others[1], others[2]
    if not (mask[:, 1:] & ~mask[:, :-1]).any():
        return ids, mask, others[1], others[2]
    order = torch.argsort(~mask, dim=1, stable=True)
    moved = [None if t is None else t.gather(1, order) for t in others[1:]]
    return ids.gather(1, order), mask.gather(1, order), moved[0], moved[1]


def _members(rows: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Which members belong to the selected rows, and their new rows, ordered by row."""
    new_rows = position.to(rows.device)[rows]
    index = torch.nonzero(new_rows >= 0).squeeze(1)
    index = index[torch.argsort(new_rows[index], stable=True)]
    return index, new_rows[index]


def _concat_texts(out: EncoderBatch, batches: Sequence[EncoderBatch]) -> None:
    if not batches:
        return
    widths = [b.input_ids.size(1) for b in batches if b.input_ids is not None]
    width = max(widths)
    for name in _TEXT_FIELDS:
        pads = name == "attention_mask" and min(widths) < width
        if all(getattr(b, name) is None for b in batches) and not pads:
            continue
        parts = []
        for b in batches:
            assert b.input_ids is not None
            value = getattr(b, name)
            if value is None:
                if name == "pooling_mask" and b.attention_mask is not None:
                    value = b.attention_mask
                elif name == "token_type_ids":
                    value = torch.zeros_like(b.input_ids)
                else:
                    value = torch.ones_like(b.input_ids, dtype=torch.bool)
            parts.append(pad(value, (0, width - value.size(1))))
        setattr(out, name, torch.cat(parts))


def _concat_images(out: EncoderBatch, batches: Sequence[EncoderBatch]) -> None:
    pixels = [b.pixel_values for b in batches if b.pixel_values is not None]
    masks = [b.patch_mask for b in batches if b.patch_mask is not None]
    shapes = [b.spatial_shapes for b in batches if b.spatial_shapes is not None]
    if masks:
        width = max(m.size(1) for m in masks)
        pixels = [pad(p, (0, 0, 0, width - p.size(1))) for p in pixels]
        out.patch_mask = torch.cat([pad(m, (0, width - m.size(1))) for m in masks])
        out.spatial_shapes = torch.cat(shapes)
    out.pixel_values = torch.cat(pixels) if pixels else None

"""Rows of texts and images, selected and appended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from vembed_fs2.models.clip.factory import create_clip_model

Row = tuple[list[list[int]], list[float]]
"""The texts and the images of a row, each image a number."""

row = st.tuples(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=7), max_size=2),
    st.lists(st.integers(0, 1000).map(float), max_size=3),
).filter(lambda r: r[0] or r[1])

rows = st.lists(row, min_size=1, max_size=6)


def make(data: list[Row], extra: int = 0, side: str = "right") -> EncoderBatch:
    """A batch of ``data``, padded to ``extra`` tokens more than needed."""
    texts = [(i, t) for i, (ts, _) in enumerate(data) for t in ts]
    images = [(i, p) for i, (_, ps) in enumerate(data) for p in ps]
    batch = EncoderBatch(len(data), tokens_per_image=5)
    if texts:
        width = max(len(t) for _, t in texts) + extra
        ids, mask = torch.zeros(len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width, dtype=torch.bool)
        for i, (_, t) in enumerate(texts):
            at = slice(0, len(t)) if side == "right" else slice(width - len(t), width)
            ids[i, at], mask[i, at] = torch.tensor(t), True
        batch.input_ids, batch.attention_mask = ids, mask
        batch.token_type_ids, batch.pooling_mask = ids % 2, mask & (ids > 3)
        batch.text_rows = torch.tensor([i for i, _ in texts])
    if images:
        batch.pixel_values = torch.tensor([p for _, p in images])[:, None, None, None].expand(-1, 3, 2, 2).clone()
        batch.image_rows = torch.tensor([i for i, _ in images])
    return batch


def unmake(batch: EncoderBatch) -> list[Row]:
    data: list[Row] = [([], []) for _ in range(batch.num_rows)]
    if batch.input_ids is not None and batch.text_rows is not None:
        masks = batch.attention_mask
        for i, r in enumerate(batch.text_rows.tolist()):
            ids = batch.input_ids[i] if masks is None else batch.input_ids[i][masks[i]]
            data[r][0].append(ids.tolist())
            for name, expected in (("token_type_ids", ids % 2), ("pooling_mask", ids > 3)):
                value = getattr(batch, name)
                assert torch.equal(value[i][masks[i]] if masks is not None else value[i], expected.to(value.dtype))
    if batch.pixel_values is not None and batch.image_rows is not None:
        for p, r in zip(batch.pixel_values, batch.image_rows.tolist()):
            data[r][1].append(float(p[0, 0, 0]))
    return data


@given(rows, st.integers(0, 3), st.data())
def test_selected_rows_are_the_rows_without_padding_that_they_do_not_need(
    data: list[Row], extra: int, draw: st.DataObject
) -> None:
    batch = make(data, extra)
    chosen = draw.draw(st.lists(st.sampled_from(range(len(data))), min_size=1, unique=True))
    selected = batch.select(chosen)
    assert unmake(selected) == [data[i] for i in chosen]
    lengths = [len(t) for i in chosen for t in data[i][0]]
    assert (selected.input_ids is None) == (not lengths)
    if selected.input_ids is not None:
        assert selected.input_ids.size(1) == max(lengths)
    assert (selected.pixel_values is None) == (not any(data[i][1] for i in chosen))
    assert selected.costs() == [batch.costs()[i] for i in chosen]
    assert selected.kinds() == [batch.kinds()[i] for i in chosen]


@given(st.lists(rows, min_size=1, max_size=4), st.integers(0, 3))
def test_appended_rows_are_the_rows(parts: list[list[Row]], extra: int) -> None:
    batches = [make(p, extra * i) for i, p in enumerate(parts)]
    batch = EncoderBatch.concat(batches)
    assert unmake(batch) == [r for p in parts for r in p]
    assert batch.costs() == [c for b in batches for c in b.costs()]
    assert batch.kinds() == [k for b in batches for k in b.kinds()]


@given(rows)
def test_costs_are_tokens_and_patches_and_kinds_are_what_rows_hold(data: list[Row]) -> None:
    batch = make(data, 2)
    assert batch.costs() == [sum(len(t) for t in ts) + 5 * len(ps) for ts, ps in data]
    assert batch.kinds() == [bool(ts) + 2 * bool(ps) for ts, ps in data]
    assert len(batch) == len(data)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=7), min_size=1, max_size=5), st.integers(0, 3))
def test_padding_on_the_left_is_moved_to_the_right(texts: list[list[int]], extra: int) -> None:
    left = make([([t], []) for t in texts], extra, side="left")
    assert left.input_ids is not None
    batch = EncoderBatch.of_text(left.input_ids, left.attention_mask, left.token_type_ids, left.pooling_mask)
    assert unmake(batch) == [([t], []) for t in texts]
    assert batch.attention_mask is not None
    assert not (batch.attention_mask[:, 1:] & ~batch.attention_mask[:, :-1]).any()


def test_appending_batches_with_and_without_masks_fills_in_what_is_missing() -> None:
    plain = EncoderBatch.of_text(torch.ones(1, 3, dtype=torch.int64))
    masked = EncoderBatch.of_text(
        torch.ones(1, 5, dtype=torch.int64), torch.tensor([[True] * 4 + [False]]), torch.ones(1, 5, dtype=torch.int64)
    )
    batch = EncoderBatch.concat([plain, masked])
    assert batch.attention_mask is not None
    assert batch.token_type_ids is not None
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.token_type_ids.tolist() == [[0] * 5, [1] * 5]


@pytest.fixture(scope="module")
def clip() -> EmbeddingModel:
    torch.manual_seed(0)
    small: dict[str, Any] = {"model_dim": 16, "num_layers": 2, "num_attn_heads": 2, "ffn_inner_dim": 24}
    config = ClipConfig(
        text=ClipTextConfig(vocab_size=50, max_seq_len=12, eos_idx=49, **small),
        vision=ClipVisionConfig(image_size=8, patch_size=4, **small),
        projection_dim=12,
    )
    return create_clip_model(config).eval()


def clip_text(*lengths: int) -> EncoderBatch:
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 48, mask.shape, generator=torch.Generator().manual_seed(sum(lengths))) * mask
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 49
    return EncoderBatch.of_text(ids, mask)


def clip_images(number: int) -> EncoderBatch:
    return EncoderBatch.of_images(torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(number)), 5)


@torch.inference_mode()
def test_rows_of_texts_only_images_only_and_both_each_get_their_embedding(clip: EmbeddingModel) -> None:
    texts, images = clip_text(4, 7, 3), clip_images(4)
    text, image = clip(texts).values, clip(images).values
    # Row 0: a text; 1: an image; 2: a text and an image; 3: a text and two images.
    mixed = EncoderBatch(
        4,
        texts.input_ids,
        texts.attention_mask,
        text_rows=torch.tensor([0, 2, 3]),
        pixel_values=images.pixel_values,
        image_rows=torch.tensor([1, 2, 3, 3]),
        tokens_per_image=5,
    )

    def fused(*parts: Tensor) -> Tensor:
        return torch.stack([normalize(p, dim=-1) for p in parts]).sum(0)

    expected = torch.stack([text[0], image[0], fused(text[1], image[1]), fused(text[2], image[2], image[3])])
    torch.testing.assert_close(clip(mixed).values, expected, rtol=1e-6, atol=1e-6)
    order = [3, 0, 2, 1]
    torch.testing.assert_close(clip(mixed.select(order)).values, expected[order], rtol=1e-6, atol=1e-6)
    for i in range(4):
        torch.testing.assert_close(clip(mixed.select([i])).values, expected[i : i + 1], rtol=1e-6, atol=1e-6)
    both = EncoderBatch.concat([texts, images])
    torch.testing.assert_close(clip(both).values, torch.cat([text, image]), rtol=1e-6, atol=1e-6)


@settings(max_examples=20)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.randoms())
def test_an_embedding_does_not_depend_on_the_other_rows(clip: EmbeddingModel, lengths: list[int], random: Any) -> None:
    batch = clip_text(*lengths)
    order = list(range(len(lengths)))
    random.shuffle(order)
    with torch.inference_mode():
        together = clip(batch).values
        for i in order:
            torch.testing.assert_close(clip(batch.select([i])).values[0], together[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(clip(batch.select(order)).values, together[order], rtol=1e-6, atol=1e-6)


def patches(shapes: list[tuple[int, int]], extra: int = 0) -> EncoderBatch:
    """One image per row, of ``h`` x ``w`` patches that hold its number of patches."""
    lengths = torch.tensor([h * w for h, w in shapes])
    mask = torch.arange(int(lengths.max()) + extra) < lengths[:, None]
    return EncoderBatch.of_patches((lengths[:, None] * mask).float().unsqueeze(2), mask, torch.tensor(shapes))


def shapes_of(batch: EncoderBatch) -> list[tuple[int, int]]:
    """The shapes of a batch of patches, if nothing else is in it."""
    assert batch.pixel_values is not None
    assert batch.patch_mask is not None
    assert batch.spatial_shapes is not None
    shapes = [(h, w) for h, w in batch.spatial_shapes.tolist()]
    for pixels, mask, (h, w) in zip(batch.pixel_values, batch.patch_mask, shapes):
        assert mask.sum() == h * w
        assert pixels[mask].eq(h * w).all()
        assert not pixels[~mask].any()
    return shapes


grids = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5)


@given(st.lists(grids, min_size=1, max_size=3), st.integers(0, 3), st.data())
def test_patches_are_selected_and_appended_with_the_padding_they_need(
    parts: list[list[tuple[int, int]]], extra: int, draw: st.DataObject
) -> None:
    batch = EncoderBatch.concat([patches(p, extra * i) for i, p in enumerate(parts)])
    shapes = [shape for p in parts for shape in p]
    assert shapes_of(batch) == shapes
    assert batch.costs() == [h * w for h, w in shapes]
    chosen = draw.draw(st.lists(st.sampled_from(range(len(shapes))), min_size=1, unique=True))
    selected = batch.select(chosen)
    assert shapes_of(selected) == [shapes[i] for i in chosen]
    assert selected.patch_mask is not None
    assert selected.patch_mask.size(1) == max(shapes[i][0] * shapes[i][1] for i in chosen)


def test_texts_of_a_fixed_width_keep_it() -> None:
    batch = make([([[1, 2]], []), ([[3, 4, 5]], [])], extra=2)
    batch.fixed_width = True
    assert batch.costs() == [5, 5]
    both = EncoderBatch.concat([batch, batch]).select([0])
    assert both.fixed_width
    assert both.input_ids is not None
    assert both.input_ids.tolist() == [[1, 2, 0, 0, 0]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_any_value_of_a_mask_but_zero_marks_a_token(side: str, dtype: torch.dtype) -> None:
    right = torch.tensor([[5, 6, 7, 0, 0], [8, 0, 0, 0, 0]])
    ids = right if side == "right" else torch.tensor([[0, 0, 5, 6, 7], [0, 0, 0, 0, 8]])
    mask, pooling = (ids % 3 + 1).where(ids > 0, 0).to(dtype) * 2, (ids > 5).to(dtype) * 3
    by_hand = EncoderBatch(2, right, (right > 0).to(dtype) * 2, None, (right > 5).to(dtype) * 3, torch.arange(2))
    for batch in (EncoderBatch.of_text(ids, mask, pooling_mask=pooling), by_hand):
        assert batch.input_ids is not None
        assert batch.attention_mask is not None
        assert batch.pooling_mask is not None
        assert batch.input_ids.tolist() == right.tolist()
        assert batch.attention_mask.tolist() == (right > 0).tolist()
        assert batch.pooling_mask.tolist() == (right > 5).tolist()
        assert batch.costs() == [3, 1]
        chosen = batch.select([1])
        assert chosen.input_ids is not None
        assert chosen.input_ids.tolist() == [[8]]


@pytest.mark.parametrize("masked", [-1.0, -torch.inf, torch.nan])
def test_masks_that_are_added_to_attention_scores_are_refused(masked: float) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    mask = torch.zeros(2, 3).masked_fill(ids == 0, masked)
    for name in ("attention_mask", "pooling_mask"):
        with pytest.raises(ValueError, match=f"`{name}` has values that are negative or NaN"):
            EncoderBatch.of_text(ids, **{name: mask})
        with pytest.raises(ValueError, match=r"must be of the shape of `input_ids`, \[2, 3\], but is \[2, 1, 1, 3\]"):
            EncoderBatch.of_text(ids, **{name: mask[:, None, None]})

"""Rows of texts and images, selected and appended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.embedding.batch import EncoderBatch, Profile
from vembed_fs2.embedding.inputs import FeatureInputs, ImageInputs, Kind, TextInputs
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from vembed_fs2.models.clip.factory import create_clip_model

Row = tuple[list[list[int]], list[float]]
"""The texts and the images of a row, each image a number."""

row = st.tuples(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=7), max_size=2),
    st.lists(st.integers(0, 1000).map(float), max_size=3),
).filter(lambda r: r[0] or r[1])

rows = st.lists(row, min_size=1, max_size=6)


def make(data: list[Row], extra: int = 0, side: str = "right", *, fixed_width: bool = False) -> EncoderBatch:
    """A batch of ``data``, padded to ``extra`` tokens more than needed."""
    texts = [(i, t) for i, (ts, _) in enumerate(data) for t in ts]
    images = [(i, p) for i, (_, ps) in enumerate(data) for p in ps]
    batch = EncoderBatch(len(data))
    if texts:
        width = max(len(t) for _, t in texts) + extra
        ids, mask = torch.zeros(len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width, dtype=torch.bool)
        for i, (_, t) in enumerate(texts):
            at = slice(0, len(t)) if side == "right" else slice(width - len(t), width)
            ids[i, at], mask[i, at] = torch.tensor(t), True
        text_rows = torch.tensor([i for i, _ in texts])
        batch.text = TextInputs(ids, text_rows, mask, ids % 2, mask & (ids > 3), fixed_width)
    if images:
        pixels = torch.tensor([p for _, p in images])[:, None, None, None].expand(-1, 3, 2, 2).clone()
        batch.images = ImageInputs(pixels, torch.tensor([i for i, _ in images]), tokens_per_image=5)
    return batch


def unmake(batch: EncoderBatch) -> list[Row]:
    data: list[Row] = [([], []) for _ in range(batch.num_rows)]
    if (text := batch.text) is not None:
        mask = torch.ones_like(text.input_ids, dtype=torch.bool) if text.attention_mask is None else text.attention_mask
        for i, r in enumerate(text.rows.tolist()):
            ids = text.input_ids[i][mask[i]]
            data[r][0].append(ids.tolist())
            for value, expected in ((text.token_type_ids, ids % 2), (text.pooling_mask, ids > 3)):
                assert value is not None
                assert torch.equal(value[i][mask[i]], expected.to(value.dtype))
    if (images := batch.images) is not None:
        for p, r in zip(images.values, images.rows.tolist()):
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
    assert (selected.text is None) == (not lengths)
    if selected.text is not None:
        assert selected.text.input_ids.size(1) == max(lengths)
    assert (selected.images is None) == (not any(data[i][1] for i in chosen))
    for found, all_rows in zip(selected.profile(), batch.profile()):
        assert found == [all_rows[i] for i in chosen]


@given(st.lists(rows, min_size=1, max_size=4), st.integers(0, 3))
def test_appended_rows_are_the_rows(parts: list[list[Row]], extra: int) -> None:
    batches = [make(p, extra * i) for i, p in enumerate(parts)]
    batch = EncoderBatch.concat(batches)
    assert unmake(batch) == [r for p in parts for r in p]
    for name in ("kinds", "tokens", "patches"):
        assert getattr(batch.profile(), name) == [n for b in batches for n in getattr(b.profile(), name)]


@given(rows)
def test_a_profile_counts_tokens_and_patches_and_says_what_rows_hold(data: list[Row]) -> None:
    batch = make(data, 2)
    profile = batch.profile()
    assert profile.tokens == [sum(map(len, ts)) for ts, _ in data]
    assert profile.patches == [5 * len(ps) for _, ps in data]
    assert profile.costs() == [sum(map(len, ts)) + 5 * len(ps) for ts, ps in data]
    assert profile.kinds == [Kind.TEXT * bool(ts) | Kind.IMAGE * bool(ps) for ts, ps in data]
    assert len(batch) == len(data)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=7), min_size=1, max_size=5), st.integers(0, 3))
def test_padding_on_the_left_is_moved_to_the_right(texts: list[list[int]], extra: int) -> None:
    left = make([([t], []) for t in texts], extra, side="left")
    assert left.text is not None
    text = left.text
    batch = EncoderBatch.of_text(text.input_ids, text.attention_mask, text.token_type_ids, text.pooling_mask)
    assert unmake(batch) == [([t], []) for t in texts]
    assert batch.text is not None
    assert batch.text.attention_mask is not None
    assert not (batch.text.attention_mask[:, 1:] & ~batch.text.attention_mask[:, :-1]).any()


def test_appending_batches_with_and_without_masks_fills_in_what_is_missing() -> None:
    plain = EncoderBatch.of_text(torch.ones(1, 3, dtype=torch.int64))
    masked = EncoderBatch.of_text(
        torch.ones(1, 5, dtype=torch.int64), torch.tensor([[True] * 4 + [False]]), torch.ones(1, 5, dtype=torch.int64)
    )
    text = EncoderBatch.concat([plain, masked]).text
    assert text is not None
    assert text.attention_mask is not None
    assert text.token_type_ids is not None
    assert text.attention_mask.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert text.token_type_ids.tolist() == [[0] * 5, [1] * 5]


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
    assert texts.text is not None
    assert images.images is not None
    mixed = EncoderBatch(
        4,
        replace(texts.text, rows=torch.tensor([0, 2, 3])),
        replace(images.images, rows=torch.tensor([1, 2, 3, 3])),
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
    assert batch.images is not None
    assert batch.images.grids is not None
    assert batch.images.grids[:, 0].eq(1).all()
    shapes = [(h, w) for _, h, w in batch.images.grids.tolist()]
    assert batch.images.values.squeeze(1).tolist() == [h * w for h, w in shapes for _ in range(h * w)]

    for pixels, mask, (h, w) in zip(*batch.images.pad_patches(), shapes):
        assert mask.sum() == h * w
        assert pixels[mask].eq(h * w).all()
        assert not pixels[~mask].any()
    return shapes


grids = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5)


@given(st.lists(grids, min_size=1, max_size=3), st.integers(0, 3), st.data())
def test_patches_are_selected_and_appended_without_padding(
    parts: list[list[tuple[int, int]]], extra: int, draw: st.DataObject
) -> None:
    batch = EncoderBatch.concat([patches(p, extra * i) for i, p in enumerate(parts)])
    shapes = [shape for p in parts for shape in p]
    assert shapes_of(batch) == shapes
    assert batch.profile().patches == [h * w for h, w in shapes]
    chosen = draw.draw(st.lists(st.sampled_from(range(len(shapes))), min_size=1, unique=True))
    selected = batch.select(chosen)
    assert shapes_of(selected) == [shapes[i] for i in chosen]


def test_texts_of_a_fixed_width_keep_it() -> None:
    batch = make([([[1, 2]], []), ([[3, 4, 5]], [])], extra=2, fixed_width=True)
    assert batch.profile().tokens == [5, 5]
    both = EncoderBatch.concat([batch, batch]).select([0])
    assert both.text is not None
    assert both.text.fixed_width
    assert both.text.input_ids.tolist() == [[1, 2, 0, 0, 0]]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_any_value_of_a_mask_but_zero_marks_a_token(side: str, dtype: torch.dtype) -> None:
    right = torch.tensor([[5, 6, 7, 0, 0], [8, 0, 0, 0, 0]])
    ids = right if side == "right" else torch.tensor([[0, 0, 5, 6, 7], [0, 0, 0, 0, 8]])
    mask, pooling = (ids % 3 + 1).where(ids > 0, 0).to(dtype) * 2, (ids > 5).to(dtype) * 3
    by_hand = TextInputs(right, torch.arange(2), (right > 0).to(dtype) * 2, None, (right > 5).to(dtype) * 3)
    for batch in (EncoderBatch.of_text(ids, mask, pooling_mask=pooling), EncoderBatch(2, by_hand)):
        assert batch.text is not None
        assert batch.text.attention_mask is not None
        assert batch.text.pooling_mask is not None
        assert batch.text.input_ids.tolist() == right.tolist()
        assert batch.text.attention_mask.tolist() == (right > 0).tolist()
        assert batch.text.pooling_mask.tolist() == (right > 5).tolist()
        assert batch.profile().tokens == [3, 1]
        chosen = batch.select([1])
        assert chosen.text is not None
        assert chosen.text.input_ids.tolist() == [[8]]


@pytest.mark.parametrize("masked", [-1.0, -torch.inf, torch.nan])
def test_masks_that_are_added_to_attention_scores_are_refused(masked: float) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    mask = torch.zeros(2, 3).masked_fill(ids == 0, masked)
    for name in ("attention_mask", "pooling_mask"):
        with pytest.raises(ValueError, match=f"`{name}` has values that are negative or NaN"):
            EncoderBatch.of_text(ids, **{name: mask})
        with pytest.raises(ValueError, match=r"must be of the shape of `input_ids`, \[2, 3\], but is \[2, 1, 1, 3\]"):
            EncoderBatch.of_text(ids, **{name: mask[:, None, None]})


def features(lengths: list[int], extra: int = 0, *, masked: bool = True) -> EncoderBatch:
    """One sequence per row, whose steps hold its length."""
    sizes = torch.tensor(lengths)
    mask = torch.arange(max(lengths) + extra) < sizes[:, None]
    values = (sizes[:, None] * mask).float().unsqueeze(2).expand(-1, -1, 3)
    return EncoderBatch(
        len(lengths), features=FeatureInputs(values, torch.arange(len(lengths)), mask if masked else None)
    )


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_features_are_selected_and_appended_with_the_padding_they_need(
    parts: list[list[int]], draw: st.DataObject
) -> None:
    batch = EncoderBatch.concat([features(p, extra) for extra, p in enumerate(parts)])
    lengths = [n for p in parts for n in p]
    assert batch.profile() == Profile([Kind.FEATURES] * len(lengths), lengths, [0] * len(lengths))
    chosen = draw.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    selected = batch.select(chosen).features
    assert selected is not None
    assert selected.mask is not None
    assert selected.num_steps().tolist() == [lengths[i] for i in chosen]
    assert selected.values.size(1) == max(lengths[i] for i in chosen)
    for values, mask, row in zip(selected.values, selected.mask, chosen):
        assert values[mask].eq(lengths[row]).all()
        assert not values[~mask].any()


def test_features_without_a_mask_get_one_beside_longer_ones() -> None:
    both = EncoderBatch.concat([features([2, 2], masked=False), features([4], masked=False)]).features
    assert both is not None
    assert both.mask is not None
    assert both.mask.sum(1).tolist() == [2, 2, 4]
    assert both.rows.tolist() == [0, 1, 2]
    alone = EncoderBatch.concat([features([2], masked=False), features([2], masked=False)]).features
    assert alone is not None
    assert alone.mask is None


def test_pixels_and_patches_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="pixels and images as patches"):
        EncoderBatch.concat([clip_images(1), patches([(1, 2)])])


def test_all_parts_move_but_the_grids(clip: EmbeddingModel) -> None:
    batch = EncoderBatch.concat([clip_text(3), patches([(1, 2)]), features([2])])
    assert batch.device.type == "cpu"
    batch.to(torch.device("meta"))
    assert batch.device.type == "meta"
    assert batch.text is not None
    assert batch.images is not None
    assert batch.features is not None
    tensors = (batch.text.input_ids, batch.text.attention_mask, batch.images.values, batch.features.mask)
    assert {t.device.type for t in tensors if t is not None} == {"meta"}
    assert batch.images.grids is not None
    assert batch.images.grids.device.type == "cpu"
    with pytest.raises(TypeError, match="no encoder of features"):
        clip(features([2]))


def test_the_names_of_yesterday_still_read_a_batch() -> None:
    batch = clip_text(3, 2)
    with pytest.warns(DeprecationWarning, match="use `batch.text.input_ids`"):
        assert batch.input_ids is batch.text.input_ids  # type: ignore[attr-defined, union-attr]
    with pytest.warns(DeprecationWarning, match="use `batch.images.values`"):
        assert batch.pixel_values is None  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        assert batch.tokens_per_image == 0  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        assert patches([(1, 2)]).spatial_shapes.tolist() == [[1, 2]]  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        assert patches([(1, 2), (1, 1)]).patch_mask.tolist() == [[True, True], [True, False]]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"cannot be set any more: set `batch.text.input_ids`"):
        batch.input_ids = torch.ones(2, 3)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="colour"):
        batch.colour  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("kind", [Kind.TEXT, Kind.IMAGE, Kind.TEXT | Kind.IMAGE])
def test_a_blank_row_is_of_its_kind_and_can_be_encoded(clip: EmbeddingModel, kind: Kind) -> None:
    blank = clip.blank(kind)
    assert blank.profile().kinds == [kind]
    assert clip(blank).values.shape == (1, 12)
    assert clip(blank).values.isfinite().all()


def test_kinds_are_described_in_words() -> None:
    assert (Kind.TEXT | Kind.IMAGE).describe() == "texts and images"
    assert Kind(0).describe() == "nothing"

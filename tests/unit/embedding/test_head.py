"""One head for texts and images: each pooling equals its definition, and says what embeddings are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import ModuleList
from torch.nn.functional import cosine_similarity

from vembed_fs2.embedding.head import (
    DenseConfig,
    Head,
    HeadConfig,
    ImageHeadConfig,
    Pooling,
    States,
    TextHead,
    head_output_dim,
    pool,
    validate_head,
)
from vembed_fs2.embedding.image_head import ImageHead, image_head_output_dim, validate_image_head
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch

LENGTHS = [7, 1, 4]

MASKS = {
    "none": None,
    "right": torch.arange(7) < torch.tensor(LENGTHS)[:, None],
    "left": torch.arange(7) >= 7 - torch.tensor(LENGTHS)[:, None],
    "holes": torch.tensor([[0, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]]).bool(),
}

SINGLE: list[Any] = ["cls", "mean", "max", "last", "weightedmean", "mean_sqrt_len", "gem"]


def naive(tokens: Tensor, mask: Tensor | None, pooling: str, p: float = 3.0) -> Tensor:
    """One text at a time, one token at a time, in float64. *Returns:* ``[N, M]``."""
    rows = []
    for i, text in enumerate(tokens.double()):
        kept = [j for j in range(len(text)) if mask is None or mask[i, j]]
        states = [text[j] for j in kept]
        total = torch.stack(states).sum(0)
        weighted = torch.stack([(j + 1) * text[j] for j in kept]).sum(0)
        powers = torch.stack([state.clamp(min=1e-6) ** p for state in states])
        by_name = {
            "cls": states[0],
            "last": states[-1],
            "max": torch.stack(states).max(0).values,
            "mean": total / len(kept),
            "mean_sqrt_len": total / len(kept) ** 0.5,
            "weightedmean": weighted / sum(j + 1 for j in kept),
            "gem": (powers.sum(0) / len(kept)) ** (1 / p),
        }
        rows.append(by_name[pooling])
    return torch.stack(rows)


def states_of(mask: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """States that must not be looked at where they are masked. *Shape:* ``[3, 7, 6]``."""
    tokens = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 1e4)


@pytest.mark.parametrize("pooling", SINGLE)
@pytest.mark.parametrize("kind", MASKS)
def test_poolings_equal_their_definitions(kind: str, pooling: Pooling) -> None:
    mask = MASKS[kind]
    tokens = states_of(mask)
    expected = naive(tokens, mask, pooling).float()
    head = Head(HeadConfig(pooling=pooling), 6)
    found, no_mask = head(States(tokens, mask))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (no_mask, head.output_dim, head.similarity) == (None, 6, "cosine")
    if mask is not None:
        torch.testing.assert_close(head(States(tokens, mask.long()))[0], found, rtol=0, atol=0)
    half = head(States(states_of(mask, torch.bfloat16), mask))[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("pooling", SINGLE)
def test_padding_of_any_side_and_width_changes_nothing(pooling: Pooling) -> None:
    """Batches move padding to the right before a model sees it; the width of it does not count."""
    ids = torch.arange(1, 8).expand(3, 7)
    tokens = torch.randn(8, 6)
    head = Head(HeadConfig(pooling=pooling), 6)
    found = {}
    for kind in ("left", "right"):
        mask = MASKS[kind]
        assert mask is not None
        rows = torch.zeros(3, 7, dtype=torch.int64)
        for i, length in enumerate(LENGTHS):
            rows[i, mask[i]] = ids[i, :length]
        batch = EncoderBatch.of_text(rows, mask)
        assert batch.text is not None
        found[kind] = head(States(tokens[batch.text.input_ids], batch.text.pooled_tokens))[0]
    alone = [head(States(tokens[ids[:1, :length]]))[0] for length in LENGTHS]
    torch.testing.assert_close(found["left"], found["right"], rtol=0, atol=0)
    torch.testing.assert_close(found["right"], torch.cat(alone), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", MASKS)
def test_several_poolings_are_put_one_after_the_other(kind: str) -> None:
    mask = MASKS[kind]
    tokens, pooled = states_of(mask), torch.randn(3, 4)
    config = HeadConfig(pooling=["last", "pooler", "cls_mean"], dense=[DenseConfig(input_dim=22, output_dim=5)])
    assert validate_head(config, 6, pooler_dim=4) == []
    head = Head(config, 6, pooler_dim=4)
    first, last, mean = (naive(tokens, mask, name).float() for name in ("cls", "last", "mean"))
    expected = head.dense[0](torch.cat([last, pooled, first, mean], dim=1))
    torch.testing.assert_close(head(States(tokens, mask, pooled))[0], expected, rtol=1e-5, atol=1e-5)
    assert head.output_dim == 5
    assert head_output_dim(HeadConfig(pooling=config.pooling), 6, 4) == 22


@pytest.mark.parametrize("pooling", SINGLE)
def test_class_token_and_registers_take_part_only_as_cls(pooling: Pooling) -> None:
    tokens = torch.randn(3, 7, 6)
    mask = MASKS["right"]
    assert mask is not None
    mask = torch.cat([torch.ones(3, 2, dtype=torch.bool), mask], dim=1)
    prefix = torch.randn(3, 2, 6)
    states = States(torch.cat([prefix, tokens], dim=1), mask, num_prefix_tokens=2)
    found = Head(ImageHeadConfig(pooling=pooling), 6)(states)[0]
    expected = prefix[:, 0] if pooling == "cls" else pool(tokens, mask[:, 2:], pooling)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("num_prefix", [0, 2])
def test_top_k_are_the_states_most_similar_to_the_first_in_their_order(kind: str, num_prefix: int) -> None:
    mask = MASKS[kind]
    tokens = states_of(mask)
    whole, whole_mask = tokens, mask
    if num_prefix:
        whole = torch.cat([torch.randn(3, num_prefix, 6), tokens], dim=1)
        whole_mask = None if mask is None else torch.cat([torch.ones(3, num_prefix, dtype=torch.bool), mask], dim=1)
    first = pool(whole, whole_mask, "cls")
    states = States(whole, whole_mask, num_prefix_tokens=num_prefix)
    vectors, counted = Head(HeadConfig(pooling="none", top_k=3), 6)(states)
    mean = Head(HeadConfig(pooling="topk", top_k=3), 6)(states)[0]
    assert counted is not None
    assert vectors.shape[:2] == counted.shape == (3, 3)
    for i, text in enumerate(tokens):
        kept = [j for j in range(7) if mask is None or mask[i, j]]
        score = {j: float(cosine_similarity(text[j], first[i], dim=0)) for j in kept}
        best = sorted(sorted(kept, key=lambda j: -score[j])[:3])
        torch.testing.assert_close(vectors[i][counted[i]], text[best], rtol=0, atol=0)
        torch.testing.assert_close(mean[i], text[best].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MASKS)
def test_each_state_becomes_a_vector_with_a_mask(kind: str) -> None:
    mask = MASKS[kind]
    tokens = states_of(mask)
    config = HeadConfig(pooling="none", dense=[DenseConfig(input_dim=6, output_dim=2, activation="tanh")])
    head = Head(config, 6)
    values, counted = head(States(tokens, None if mask is None else mask.int()))
    torch.testing.assert_close(values, torch.tanh(head.dense[0](tokens)), rtol=0, atol=0)
    assert counted is not None
    assert torch.equal(counted, torch.ones(3, 7, dtype=torch.bool) if mask is None else mask)
    assert (head.similarity, head.output_dim) == ("maxsim", 2)


def test_a_vector_of_its_own_is_not_the_last_layers_output() -> None:
    """FSDP2 puts a hook on that tensor."""
    tokens = torch.randn(2, 3, 4)
    assert Head(HeadConfig(pooling="none"), 4)(States(tokens))[0] is not tokens


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        (HeadConfig(pooling="most"), {}, "`head.pooling` must be one of cls, mean"),  # type: ignore[arg-type]
        (HeadConfig(pooling=["cls", "most"]), {}, "must be one of"),  # type: ignore[list-item]
        (HeadConfig(pooling=[]), {}, "must be one of"),
        (HeadConfig(pooling="none"), {}, "must not be 'none': the model returns one vector per row"),
        (HeadConfig(pooling=["none", "cls"]), {"multi_vector": True}, "must not have 'none' beside others"),
        (HeadConfig(pooling=["cls", "pooler"]), {"has_pooler": False}, "is 'pooler', but the model has none"),
        (HeadConfig(pooling=["mean", "cls"]), {"has_class_token": False}, "the class token, but the model has none"),
        (HeadConfig(pooling="topk"), {}, "`head.top_k` must be set"),
        (HeadConfig(pooling=["cls", "max"], top_k=3), {}, "`head.top_k` is set"),
        (HeadConfig(pooling="topk", top_k=0), {}, "`head.top_k` must be greater than or equal to 1"),
        (HeadConfig(gem_p=0.0), {"name": "image_head"}, "`image_head.gem_p` must be positive"),
        (HeadConfig(similarity="maxsim"), {}, "must be 'cosine' or 'dot'"),  # type: ignore[arg-type]
        (
            HeadConfig(pooling="cls_mean", dense=[DenseConfig(input_dim=6, output_dim=4)]),
            {},
            r"`head.dense\[0\].input_dim` must be 12",
        ),
    ],
)
def test_heads_that_cannot_be_are_errors(head: HeadConfig, options: dict[str, Any], message: str) -> None:
    (error,) = validate_head(head, 6, **options)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


class Bag(EmbeddingModel):
    modalities = frozenset({"text"})

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)

    def layer_stacks(self) -> list[ModuleList]:
        return []


class NewBag(Bag):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.head = Head(config, 4)

    def encode_text_states(self, batch: EncoderBatch) -> States:
        assert batch.text is not None
        return States(self.embed(batch.text.input_ids), batch.text.pooled_tokens)


class OldBag(Bag):
    """As plugins were written before the head said what embeddings are."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.head = TextHead(config)  # type: ignore[assignment]
        self.embedding_dim = head_output_dim(config, 4)  # type: ignore[assignment]
        self.normalize = config.normalize  # type: ignore[assignment]

    def encode_text(self, batch: EncoderBatch) -> Tensor:
        assert batch.input_ids is not None
        vectors: Tensor = self.head(self.embed(batch.input_ids), batch.attention_mask)  # type: ignore[call-arg, arg-type, assignment]
        return vectors


def test_what_embeddings_are_is_read_from_the_head() -> None:
    dense = [DenseConfig(input_dim=4, output_dim=3)]
    model = NewBag(HeadConfig(normalize=False, similarity="dot", dense=dense))
    assert (model.embedding_dim, model.normalize, model.similarity, model.is_multi_vector) == (3, False, "dot", False)
    model.head = Head(HeadConfig(pooling="none"), 4)
    assert (model.embedding_dim, model.normalize, model.similarity, model.is_multi_vector) == (4, True, "maxsim", True)
    with pytest.raises(TypeError, match="Bag has no `head`"):
        Bag().embedding_dim  # noqa: B018


def test_models_of_plugins_that_assign_it_go_on_working() -> None:
    config = HeadConfig(dense=[DenseConfig(input_dim=4, output_dim=3)], normalize=False)
    old, new = OldBag(config), NewBag(config)
    new.load_state_dict(old.state_dict())
    assert (old.embedding_dim, old.normalize, old.similarity) == (new.embedding_dim, new.normalize, new.similarity)
    batch = EncoderBatch.of_text(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    torch.testing.assert_close(old(batch).values, new(batch).values, rtol=0, atol=0)


def test_heads_of_images_by_their_old_names() -> None:
    seqs, pooled = torch.randn(2, 5, 4), torch.randn(2, 3)
    for pooling in ("cls", "mean", "cls_mean", "gem", "pooler", "none"):
        config = ImageHeadConfig(pooling=pooling)  # type: ignore[arg-type]
        assert validate_image_head(config, has_pooler=True) == []
        expected = Head(config, 4, pooler_dim=3)(States(seqs, None, pooled, 2))[0]
        torch.testing.assert_close(ImageHead(config, 2)(seqs, pooled=pooled), expected, rtol=0, atol=0)
        assert image_head_output_dim(config, 4, 3) == expected.size(-1)
    assert ImageHeadConfig().pooling == "cls"


@pytest.mark.parametrize(("value", "expected"), [(True, True), (False, False), (None, True)])
def test_a_model_may_assign_what_a_configuration_says(value: bool | None, expected: bool) -> None:
    """Also the `None` of a configuration that does not say whether embeddings are normalised."""
    model = OldBag(HeadConfig(normalize=value))
    assert model.normalize is expected
    assert model.has_normalization is (value is True)

"""The gradient of a cached step is that of the plain step; what cannot be right is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from vembed_fs2.embedding.model import Embeddings, EncoderBatch
from vembed_fs2.gradcache import GradCache

Batch = dict[str, Tensor]

BUDGETS = [0, "all", "6KiB", "auto"]


class Encoder(nn.Module):
    """Mean of token embeddings through two layers, with dropout: takes what transformers' models take."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 16)
        self.inner = nn.Linear(16, 32)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(32, 8)

    def tokens(self, input_ids: Tensor) -> Tensor:
        return self.outer(self.dropout(torch.tanh(self.inner(self.embed(input_ids)))))

    def forward(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(2)
        return (self.tokens(batch["input_ids"]) * mask).sum(1) / mask.sum(1).clamp(min=1)


def texts(rows: int, seed: int, width: int = 12, side: str = "right") -> Batch:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, width, (rows, 1), generator=g)
    mask = torch.arange(width)[None] < lengths
    if side == "left":
        mask = mask.flip(1)
    elif side == "none":
        mask = torch.ones_like(mask)
    ids = torch.randint(1, 50, (rows, width), generator=g) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def contrast(queries: Tensor, documents: Tensor) -> Tensor:
    logits = normalize(queries.float(), dim=-1) @ normalize(documents.float(), dim=-1).T * 10
    return cross_entropy(logits, torch.arange(queries.size(0)), reduction="sum")


def gradients(*modules: nn.Module) -> list[Tensor | None]:
    grads = [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()]
    for module in modules:
        module.zero_grad(set_to_none=True)
    return grads


def assert_close(got: list[Tensor | None], expected: list[Tensor | None], tolerance: float = 1e-5) -> None:
    assert [g is None for g in got] == [e is None for e in expected]
    a = torch.cat([g.double().reshape(-1) for g in got if g is not None])
    b = torch.cat([e.double().reshape(-1) for e in expected if e is not None])
    assert b.norm() > 0
    assert float((a - b).norm() / b.norm()) <= tolerance


def plain(encode: Any, loss: Any, *roles: Any, scale: float = 1.0) -> Tensor:
    encoders = [encode] * len(roles) if callable(encode) else encode
    value: Tensor = loss(*(f(r) for f, r in zip(encoders, roles)))
    (value * scale).backward()
    return value.detach()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_gradients_of_dicts_equal_the_plain_step(budget: Any, side: str) -> None:
    encoder = Encoder()
    queries, documents = texts(7, 1, side=side), texts(9, 2, width=20, side=side)
    expected = plain(encoder, contrast, queries, documents)
    reference = gradients(encoder)
    step = GradCache(encoder, contrast, chunk_tokens=40, activation_budget=budget)
    value = step(queries, documents)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)
    assert_close(gradients(encoder), reference)
    assert step.stats.num_chunks > 3


def test_left_padded_roles_of_different_widths_keep_their_last_token() -> None:
    # The last state is the text's, for models that are padded on the left; padding on the right would shift it.
    encoder = Encoder()

    def encode(batch: Batch) -> Tensor:
        return encoder.tokens(batch["input_ids"])[:, -1]

    for side in ("left", "none"):
        queries, documents = texts(5, 1, width=6, side=side), texts(5, 2, width=20, side=side)
        plain(encode, contrast, queries, documents)
        reference = gradients(encoder)
        GradCache(encode, contrast, chunk_tokens=40)(queries, documents).backward()
        assert_close(gradients(encoder), reference)


def test_padding_on_the_right_is_cut_in_each_chunk() -> None:
    widths = []
    encoder = Encoder()

    def encode(batch: Batch) -> Tensor:
        widths.append((tuple(batch["input_ids"].shape), int(batch["attention_mask"].sum(1).max())))
        assert batch["pixel_values"].shape[1:] == (12, 2, 2)
        return encoder(batch)

    queries, documents = texts(6, 1), texts(6, 2)
    # As many channels as tokens: still no sequence.
    queries["pixel_values"] = documents["pixel_values"] = torch.zeros(6, 12, 2, 2)
    step = GradCache(encode, contrast, chunk_tokens=16)
    step(queries, documents)
    assert all(shape[1] == longest for shape, longest in widths)
    assert step.stats.num_padded_tokens == sum(rows * width for (rows, width), _ in widths)
    assert step.stats.num_tokens == int(queries["attention_mask"].sum() + documents["attention_mask"].sum())


def numbered(mask: Tensor, kind: str) -> Tensor:
    """The same mask with other values."""
    values = {
        "twos": mask * 2,
        "documents": mask * (1 + torch.arange(mask.size(1)) // 3),  # Packed texts: 1 1 1 2 2 2 0 0.
        "floats": mask * 0.25,
        "added": torch.zeros(mask.shape).masked_fill(mask == 0, -1e4),
        "infinite": torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf),
    }
    return values[kind]


@pytest.mark.parametrize("kind", ["twos", "documents", "floats", "added", "infinite"])
def test_masks_of_other_values_than_0_and_1_cut_no_token_and_plan_by_tokens(kind: str) -> None:
    encoder = Encoder()

    def encode(batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        tokens = mask == 0 if kind in ("added", "infinite") else mask != 0
        return encoder({"input_ids": batch["input_ids"], "attention_mask": tokens.long()})

    plain(encoder, contrast, texts(7, 1), texts(9, 2))
    reference = gradients(encoder)
    roles = texts(7, 1), texts(9, 2)
    lengths = torch.cat([role["attention_mask"].sum(1) for role in roles])
    for role in roles:
        role["attention_mask"] = numbered(role["attention_mask"], kind)
    step = GradCache(encode, contrast, chunk_tokens=30)
    step(*roles).backward()
    assert_close(gradients(encoder), reference)
    # A mask that is added does not say where padding begins.
    assert step.stats.num_tokens == (int(lengths.sum()) if kind in ("twos", "documents", "floats") else 16 * 12)


def test_a_mask_of_pairs_of_tokens_counts_the_tokens() -> None:
    encoder = Encoder()

    def encode(batch: Batch) -> Tensor:
        return encoder({**batch, "attention_mask": batch["attention_mask"][:, 0]})

    roles = texts(7, 1), texts(7, 2)
    plain(encoder, contrast, *roles)
    reference = gradients(encoder)
    for role in roles:
        role["attention_mask"] = role["attention_mask"][:, None].expand(-1, 12, -1)
    step = GradCache(encode, contrast, chunk_tokens=30)
    step(*roles).backward()
    assert_close(gradients(encoder), reference)
    assert (step.stats.num_tokens, step.stats.num_chunks) == (14 * 12, 7)


def test_roles_of_different_keys_share_an_encoder() -> None:
    encoder, tower = Encoder(), nn.Linear(5, 8)

    def encode(batch: Batch) -> Tensor:
        return tower(batch["features"]) if "features" in batch else encoder(batch)

    queries, documents = texts(6, 1), {"features": torch.randn(6, 5)}
    plain(encode, contrast, queries, documents)
    reference = gradients(encoder, tower)
    GradCache(encode, contrast, chunk_tokens=20)(queries, documents).backward()
    assert_close(gradients(encoder, tower), reference)


def as_batch(batch: Batch) -> EncoderBatch:
    return EncoderBatch.of_text(batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_of_encoder_batches_equal_the_plain_step(budget: Any) -> None:
    encoder = Encoder()

    def encode(batch: EncoderBatch) -> Embeddings:
        return Embeddings(encoder({"input_ids": batch.text.input_ids, "attention_mask": batch.text.attention_mask}))

    def loss(q: Embeddings, d: Embeddings) -> Tensor:
        assert isinstance(q, Embeddings)
        return contrast(q.values, d.values)

    roles = as_batch(texts(7, 1)), as_batch(texts(9, 2, width=20))
    plain(encode, loss, *roles)
    reference = gradients(encoder)
    GradCache(encode, loss, chunk_tokens=40, activation_budget=budget)(*roles).backward()
    assert_close(gradients(encoder), reference)


@pytest.mark.parametrize("budget", BUDGETS)
def test_two_encoders_each_get_their_gradients(budget: Any) -> None:
    f, g = Encoder(seed=1), Encoder(seed=2)
    roles = texts(6, 1), texts(8, 2)
    plain([f, g], contrast, *roles)
    reference = gradients(f, g)
    GradCache([f, g], contrast, chunk_tokens=24, activation_budget=budget)(*roles).backward()
    assert_close(gradients(f, g), reference)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, queries: Tensor, documents: Tensor) -> Tensor:
        return contrast(queries * self.scale, documents) + (queries.sum() * self.scale) ** 2 / 100


@pytest.mark.parametrize("hidden", [False, True])
def test_parameters_of_the_loss_get_gradients(hidden: bool) -> None:
    encoder, module = Encoder(), Scaled()
    # A function that uses a module: the engine cannot see its parameters.
    loss: Callable[..., Tensor] = (lambda q, d: module(q, d)) if hidden else module
    roles = texts(6, 1), texts(8, 2)
    for _ in range(2):
        plain(encoder, module, *roles)
    reference = gradients(encoder, module)
    for _ in range(2):
        GradCache(encoder, loss, chunk_tokens=24)(*roles).backward()
    assert_close(gradients(encoder, module), reference)


def max_sim(query: tuple[Tensor, Tensor], document: tuple[Tensor, Tensor]) -> Tensor:
    (q, q_mask), (d, d_mask) = query, document
    scores = torch.einsum("ild,jmd->ijlm", q, d).masked_fill(~d_mask[None, :, None].bool(), -1e4)
    logits = (scores.amax(3) * q_mask[:, None]).sum(2)
    return cross_entropy(logits, torch.arange(q.size(0)), reduction="sum")


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_of_several_vectors_per_row_equal_the_plain_step(budget: Any) -> None:
    encoder = Encoder()

    def encode(batch: Batch) -> tuple[Tensor, Tensor]:
        return encoder.tokens(batch["input_ids"]), batch["attention_mask"]

    roles = texts(6, 1), texts(8, 2, width=17)
    plain(encode, max_sim, *roles)
    reference = gradients(encoder)
    GradCache(encode, max_sim, chunk_tokens=30, activation_budget=budget)(*roles).backward()
    assert_close(gradients(encoder), reference)


class Towers(nn.Module):
    """Texts and images, with a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Encoder(), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch: EncoderBatch) -> Embeddings:
        if batch.images is not None:
            values = self.image(batch.images.values.flatten(1))
        else:
            values = self.text({"input_ids": batch.text.input_ids, "attention_mask": batch.text.attention_mask})
        return Embeddings(values, None, {"logit_scale": self.scale.clone()})

    @staticmethod
    def loss(q: Embeddings, d: Embeddings) -> Tensor:
        assert q.logit_scale is not None
        return contrast(q.values, d.values) * q.logit_scale.exp().squeeze()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("frozen", ["", "text", "image", "both"])
def test_frozen_towers_cost_nothing_and_the_temperature_is_trained_regardless(budget: Any, frozen: str) -> None:
    model = Towers()
    for name in ("text", "image"):
        getattr(model, name).requires_grad_(frozen not in (name, "both"))
    images = EncoderBatch.of_images(torch.randn(6, 3, 2, 2), tokens_per_image=4)
    roles = as_batch(texts(6, 1)), images
    plain(model, model.loss, *roles)
    reference = gradients(model)
    step = GradCache(model, model.loss, chunk_tokens=16, activation_budget=budget)
    value = step(*roles)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    value.backward()
    assert_close(gradients(model), reference)
    if frozen == "both" or budget == "all":
        assert not calls

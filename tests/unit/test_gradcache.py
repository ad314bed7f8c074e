"""The gradient of a cached step is that of the plain step; what cannot be right is an error."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.utils.checkpoint import checkpoint

from vembed_fs2.gradcache import GradCache
from vembed_fs2.gradcache.replay import SavedBytes
from vembed_fs2.models.embedding import Embeddings, EncoderBatch

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
        return Embeddings(encoder({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}))

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
        if batch.pixel_values is not None:
            values = self.image(batch.pixel_values.flatten(1))
        else:
            values = self.text({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
        return Embeddings(values, None, self.scale.clone())

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


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_budgets_do_not_change_a_bit_of_the_gradients(dtype: torch.dtype | None) -> None:
    encoder = Encoder(dropout=0.3)
    results, states = [], []
    for budget in [0, "all", "6KiB", "12KiB"]:
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            step = GradCache(encoder, contrast, chunk_tokens=24, activation_budget=budget)
            value = step(texts(8, 1), texts(8, 2))
        value.backward()
        results.append([value.detach(), *gradients(encoder)])
        states.append(torch.get_rng_state())
    for result, state in zip(results[1:], states[1:]):
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
        assert torch.equal(state, states[0])


def test_random_numbers_go_on_as_after_a_plain_step_of_the_same_chunks() -> None:
    encoder = Encoder(dropout=0.3)
    roles = texts(8, 1, side="none"), texts(8, 2, side="none")
    torch.manual_seed(5)
    # One chunk, so that the plain step draws the same masks.
    plain(
        lambda b: encoder(b), lambda x: contrast(x[:8], x[8:]), {k: torch.cat([r[k] for r in roles]) for k in roles[0]}
    )
    reference, state = gradients(encoder), torch.get_rng_state()
    torch.manual_seed(5)
    GradCache(encoder, contrast, chunk_tokens=10_000, activation_budget=0)(*roles).backward()
    assert_close(gradients(encoder), reference)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("budget", [0, "all"])
def test_autocast_equals_the_plain_step_under_autocast(budget: Any) -> None:
    encoder = Encoder()
    roles = texts(8, 1), texts(8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        value = contrast(encoder(roles[0]), encoder(roles[1]))
    value.backward()
    reference = gradients(encoder)
    with torch.autocast("cpu", torch.bfloat16):
        value = GradCache(encoder, contrast, chunk_tokens=24, activation_budget=budget)(*roles)
    value.backward()
    assert_close(gradients(encoder), reference, 2e-2)


@pytest.mark.parametrize("inside", [False, True])
def test_chunks_are_replayed_as_they_were_encoded_wherever_the_backward_pass_runs(inside: bool) -> None:
    encoder = Encoder()
    dtypes = []
    encoder.inner.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        value = GradCache(encoder, contrast, chunk_tokens=24, activation_budget=0)(texts(8, 1), texts(8, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        value.backward()
    assert set(dtypes) == {torch.bfloat16 if inside else torch.float32}


def test_a_single_kept_chunk_under_autocast_is_the_plain_step() -> None:
    encoder = Encoder()
    batch = texts(8, 1, side="none")

    def loss(x: Tensor) -> Tensor:
        return contrast(x[:4], x[4:])

    with torch.autocast("cpu", torch.bfloat16):
        plain(encoder, loss, batch)
        reference = gradients(encoder)
        GradCache(encoder, loss, chunk_tokens=1000, activation_budget="all")(batch).backward()
    assert_close(gradients(encoder), reference, 0.0)


def test_small_gradients_of_half_precision_survive_with_a_loss_scale() -> None:
    """Without the scale, the gradients of fp16 embeddings are below the smallest number that fp16 has."""
    encoder = Encoder()

    def encode(batch: Batch) -> Tensor:
        return encoder(batch).half()

    def loss(q: Tensor, d: Tensor) -> Tensor:
        return contrast(q, d) * 1e-7

    roles = texts(6, 1), texts(6, 2)
    scale = 2.0**16
    plain(encode, loss, *roles, scale=scale)
    reference = gradients(encoder)
    (GradCache(encode, loss, chunk_tokens=24, activation_budget=0)(*roles) * scale).backward()
    assert_close(gradients(encoder), reference, 1e-3)


def test_scaled_and_accumulated_steps_add_up() -> None:
    encoder = Encoder()
    for seed in (1, 2):
        plain(encoder, contrast, texts(6, seed), texts(6, seed + 10), scale=0.5)
    reference = gradients(encoder)
    for seed in (1, 2):
        step = GradCache(encoder, contrast, chunk_tokens=24)
        (step(texts(6, seed), texts(6, seed + 10)) / 2).backward()
    assert_close(gradients(encoder), reference)


def test_two_steps_may_be_added_before_one_backward_pass() -> None:
    encoder = Encoder()
    step = GradCache(encoder, contrast, chunk_tokens=24, activation_budget=0)
    plain(encoder, contrast, texts(6, 1), texts(6, 2))
    plain(encoder, contrast, texts(6, 3), texts(6, 4))
    reference = gradients(encoder)
    (step(texts(6, 1), texts(6, 2)) + step(texts(6, 3), texts(6, 4))).backward()
    assert_close(gradients(encoder), reference)


def test_a_second_backward_pass_is_an_error() -> None:
    value = GradCache(Encoder(), contrast)(texts(4, 1), texts(4, 2))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="called twice"):
        value.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_alone_is_computed(mode: Any) -> None:
    encoder = Encoder()
    roles = texts(6, 1), texts(6, 2)
    expected = contrast(encoder(roles[0]), encoder(roles[1]))
    with mode():
        value = GradCache(encoder, contrast, chunk_tokens=24)(*roles)
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert not value.requires_grad
    assert gradients(encoder) == [None] * 5


def test_at_most_one_graph_is_alive_without_a_budget() -> None:
    encoder = Encoder()
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Marker:
        pass

    def pack(tensor: Tensor) -> Any:
        nonlocal most
        most = max(most, len(alive))
        return tensor

    def encode(batch: Batch) -> Tensor:
        marker = Marker()
        if torch.is_grad_enabled():
            alive.add(marker)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = encoder(batch)
            # The graph, and nothing else, keeps the marker alive.
            return _Hold.apply(output, marker)

    step = GradCache(encode, contrast, chunk_tokens=24, activation_budget=0)
    value = step(texts(12, 1), texts(12, 2))
    assert step.stats.num_chunks >= 8
    assert len(alive) == 1
    value.backward()
    assert most == 1
    assert len(alive) == 0


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, marker: object) -> Tensor:
        ctx.marker = marker
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_nothing_of_a_step_outlives_its_backward_pass() -> None:
    encoder = Encoder()
    queries, documents = texts(6, 1), texts(6, 2)
    value = GradCache(encoder, contrast, chunk_tokens=24)(queries, documents)
    inputs = [weakref.ref(t) for t in (*queries.values(), *documents.values())]
    value.backward()
    del queries, documents
    assert value.grad_fn is not None
    assert all(ref() is None for ref in inputs)


def test_a_budget_keeps_as_many_graphs_as_it_holds() -> None:
    encoder = Encoder()
    roles = texts(12, 1, side="none"), texts(12, 2, side="none")
    saved = SavedBytes()
    with saved.measuring():
        encoder({k: v[:2].clone() for k, v in roles[0].items()})
    step = GradCache(encoder, contrast, chunk_tokens=24, activation_budget=int(saved.total * 4.5))
    step(*roles)
    assert (step.stats.num_chunks, step.stats.num_kept) == (12, 5)  # The first is not counted.


def test_checkpointed_layers_count_what_they_keep() -> None:
    encoder = Encoder()
    x = torch.randn(100, 16, requires_grad=True)
    saved = SavedBytes()
    with saved.measuring():
        checkpoint(lambda y: encoder.outer(torch.tanh(encoder.inner(y))), x * 2, use_reentrant=False)
    assert saved.total == x.numel() * 4


def test_weights_cast_by_autocast_are_no_activations() -> None:
    layer, x = nn.Linear(512, 512), torch.randn(2, 512)
    saved = SavedBytes()
    with saved.measuring(), torch.autocast("cpu", torch.bfloat16):
        layer(torch.tanh(layer(x)))
    assert 0 < saved.total < 512 * 100


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda b: b["input_ids"].float().sum(1), r"must return \[n, D\] or \[n, L, D\]"),
        (lambda b: b["input_ids"][:1].float(), "for n = 6 rows"),
        (lambda b: {"last_hidden_state": b["input_ids"]}, "returned `dict`"),
        (lambda b: None, "returned `NoneType`"),
        (lambda b: (b["input_ids"].float(), b["attention_mask"]), r"A mask must be \[n, L\]"),
    ],
)
def test_wrong_outputs_of_an_encoder_are_errors(encode: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GradCache(encode, contrast, chunk_tokens=1000)({**texts(6, 1, side="none")})


def test_vectors_of_different_numbers_need_a_mask() -> None:
    encoder = Encoder()
    with pytest.raises(ValueError, match=r"must return `\(embeddings, mask\)`"):
        GradCache(lambda b: encoder.tokens(b["input_ids"]), contrast, chunk_tokens=12)(texts(6, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda e: GradCache(e, contrast, chunk_tokens=0), "`chunk_tokens` must be"),
        (lambda e: GradCache(e, contrast, activation_budget="lots"), "`activation_budget` must be"),
        (lambda e: GradCache([e, e], contrast)(texts(2, 1)), "2 encoders, but 1 roles"),
        (lambda e: GradCache(e, contrast)(), "0 roles"),
        (lambda e: GradCache(e, contrast)(texts(0, 1), texts(0, 2)), "at least one row"),
        (lambda e: GradCache(e, lambda q, d: q)(texts(2, 1), texts(2, 2)), "must return a scalar"),
        (lambda e: GradCache(e, lambda q, d: {})(texts(2, 1), texts(2, 2)), "must return a scalar"),
        (lambda e: GradCache(e, contrast)(["a text"], ["b"]), "A role must be an EncoderBatch or a dict"),
        (lambda e: GradCache(e, contrast)({"input_ids": [[1]]}, {}), "`input_ids` of a role must be a tensor"),
        (lambda e: GradCache(e, contrast)({}, {}), "same number of rows"),
        (lambda e: GradCache(e, contrast)(texts(2, 1), as_batch(texts(2, 2))), "must be of one type"),
    ],
)
def test_wrong_uses_are_errors_that_name_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(Encoder())


def test_a_role_without_rows_beside_one_with_rows_is_fine() -> None:
    encoder = Encoder()
    value = GradCache(encoder, lambda q, d, n: contrast(q, torch.cat([d, n])))(texts(3, 1), texts(3, 2), texts(0, 3))
    value.backward()
    assert gradients(encoder)[0] is not None


def test_bound_methods_and_partials_are_encoders() -> None:
    encoder = Encoder()
    roles = texts(4, 1), texts(4, 2)
    plain(encoder, contrast, *roles)
    reference = gradients(encoder)
    for encode in (encoder.forward, partial(encoder), lambda b: encoder(b)):
        GradCache(encode, contrast, chunk_tokens=24)(*roles).backward()
        assert_close(gradients(encoder), reference)


BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq2", "fairseq2n", "transformers", "PIL", "pyarrow", "peft"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
import vembed_fs2.losses, vembed_fs2.gradcache, vembed_fs2.distributed
import vembed_fs2.evaluation.metrics, vembed_fs2.evaluation.search
assert vembed_fs2.losses.InfoNCE and vembed_fs2.gradcache.GradCache
"""


def test_the_pure_parts_import_with_torch_alone() -> None:
    result = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

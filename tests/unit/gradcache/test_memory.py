"""Gradient cache: what is kept, replayed and refused."""

from __future__ import annotations

import subprocess
import sys
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vembed_fs2.gradcache import GradCache
from vembed_fs2.gradcache.replay import RngState, SavedBytes

from .test_engine import (
    Batch,
    Encoder,
    as_batch,
    assert_close,
    contrast,
    gradients,
    plain,
    texts,
)


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
            return Hold.apply(output, marker)

    step = GradCache(encode, contrast, chunk_tokens=24, activation_budget=0)
    value = step(texts(12, 1), texts(12, 2))
    assert step.stats.num_chunks >= 8
    assert len(alive) == 1
    value.backward()
    assert most == 1
    assert len(alive) == 0


class Hold(torch.autograd.Function):
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


def test_encoders_share_the_budget() -> None:
    encoders = [Encoder(seed=1), Encoder(seed=2)]
    roles = texts(12, 1, side="none"), texts(12, 2, side="none")
    step = GradCache(encoders, contrast, chunk_tokens=24, activation_budget=0)
    step(*roles).backward()
    per_chunk = step.stats.graph_bytes // step.stats.num_chunks
    for num_kept in (3, 7):
        step = GradCache(encoders, contrast, chunk_tokens=24, activation_budget=int(per_chunk * (num_kept + 0.5)))
        step(*roles).backward()
        assert (step.stats.num_chunks, step.stats.num_kept) == (12, 2 + num_kept)  # The first ones are not counted.


def test_the_random_numbers_of_a_device_are_replayed_where_the_encoder_moves_its_inputs_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = {torch.device("cuda", 1): "first"}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    state = RngState(torch.device("cpu"))
    states[torch.device("cuda", 1)] = "second"
    state.set()
    assert states == {torch.device("cuda", 1): "first"}


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
        (
            lambda b: (b["input_ids"].float(), None, 3),
            "tensors after the embeddings and their mask, but returned `int`",
        ),
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


def test_the_bytes_of_a_token_are_reported() -> None:
    encoder = Encoder()
    roles = texts(12, 1, side="none"), texts(12, 2, side="none")
    saved = SavedBytes()
    with saved.measuring():
        encoder({k: v[:2].clone() for k, v in roles[0].items()})
    step = GradCache(encoder, contrast, chunk_tokens=24, activation_budget=0)
    for _ in range(2):
        step(*roles)
        assert step.stats.bytes_per_token == pytest.approx(saved.total / 24, rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_sync": "first"}, "`grad_sync` must be 'last' or 'every_chunk'"),
        ({"chunk_patches": 0}, "`chunk_patches` must be greater"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradCache(Encoder(), contrast, **options)(texts(6, 1), texts(6, 2))

"""The sigmoid loss against SigLIP in transformers, and against its formula in float64."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vembed_fs2.losses import MAX_LOGIT_SCALE, RowInfo, create_loss
from vembed_fs2.losses.sigmoid import Sigmoid, SigmoidConfig

from .objectives import Case, assert_equal, cases, embeddings, same_pairs, similarities

Same = Literal["mask", "positive", "negative"]

FIXED = {"learn_temperature": False, "learn_bias": False}


def naive(s_bm: Tensor, rows: RowInfo, scale: Tensor, bias: Tensor, same: Same) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    related = same_pairs(rows)
    for i in range(s_bm.size(0)):
        for j in range(s_bm.size(1)):
            z = 1.0 if i == j or (same == "positive" and related[i, j]) else -1.0
            if not (same == "mask" and related[i, j]):
                loss = loss + torch.log1p(torch.exp(-z * (scale.double() * s_bm[i, j] + bias.double()))).squeeze()
    return loss


@settings(max_examples=60)
@given(
    cases(),
    st.sampled_from(["mask", "positive", "negative"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.5, 3.0, 10.0]),
    st.sampled_from([-10.0, -1.0, 2.0]),
)
def test_value_gradient_and_metrics_are_those_of_the_formula(
    case: Case, same: Same, cosine: bool, learn: bool, scale: float, bias: float
) -> None:
    q, d = case.embeddings()
    config = SigmoidConfig(
        temperature=1 / scale,
        bias=bias,
        learn_temperature=learn,
        learn_bias=learn,
        same=same,
        similarity="cosine" if cosine else "dot",
    )
    log_scale, beta = torch.tensor([math.log(scale)], requires_grad=True), torch.tensor([bias], requires_grad=True)
    learned = {"logit_scale": log_scale, "logit_bias": beta} if learn else {}
    with case.tiles():
        output = Sigmoid(config)(q, d, case.rows, **learned)
    s_bm = similarities(q, d, cosine=cosine)
    expected = naive(s_bm, case.rows, log_scale.exp(), beta, same)
    assert_equal(output.loss, expected, [q, d, *learned.values()])
    related = same_pairs(case.rows)
    num, others = case.num_queries, case.num_documents - 1
    negatives = ~torch.eye(num, others + 1, dtype=torch.bool)
    if same != "negative":
        negatives &= ~related
    found = [bool((s_bm[i, i] > s_bm[i][negatives[i]]).all()) for i in range(num)]
    masked = int(related.sum()) if same == "mask" else 0
    metrics = {
        "accuracy": sum(found),
        "num_negatives": int(negatives.sum()),
        "masked_fraction": masked / max(others, 1),
        "temperature": num / scale,
        "bias": num * bias,
    }
    assert {k: float(v) for k, v in output.metrics.items()} == pytest.approx(metrics, rel=1e-5)


def test_equals_siglip_in_transformers() -> None:
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**small, "vocab_size": 30, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 8, "patch_size": 4},
    )
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(10.0))
        model.logit_bias.fill_(-2.0)
    theirs = model(input_ids=torch.randint(30, (5, 8)), pixel_values=torch.randn(5, 3, 8, 8), return_loss=True)
    q, d = theirs.text_embeds, theirs.image_embeds  # Of unit length: their dot product is the cosine.
    output = Sigmoid(SigmoidConfig(similarity="dot"))(
        q, d, RowInfo.distinct(5, 5), logit_scale=model.logit_scale, logit_bias=model.logit_bias
    )
    assert_equal(output.loss, theirs.loss, [q, d, model.logit_scale, model.logit_bias], factor=1 / 5)


def test_float64_stays_float64() -> None:
    q, d = embeddings(5, 1, dtype=torch.float64), embeddings(7, 2, dtype=torch.float64)
    output = Sigmoid(SigmoidConfig(temperature=0.25, bias=-1.5, **FIXED))(q, d, RowInfo.distinct(5, 7))
    expected = naive(similarities(q, d), RowInfo.distinct(5, 7), torch.tensor([4.0]), torch.tensor([-1.5]), "negative")
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(output.loss, [q, d])
    for got, reference in zip(grads, torch.autograd.grad(expected, [q, d])):
        torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_low_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    q, d = embeddings(5, 1).to(dtype), embeddings(5, 2).to(dtype)
    loss = Sigmoid(SigmoidConfig(**FIXED))
    assert torch.equal(loss(q, d).loss, loss(q.float(), d.float()).loss)


@pytest.mark.parametrize(("scale", "bias"), [(100.0, 80.0), (100.0, -80.0)])
def test_large_logits_have_finite_losses_and_gradients(scale: float, bias: float) -> None:
    q, d = embeddings(4, 1), embeddings(6, 2)
    rows = RowInfo(torch.tensor([1, 1, 2, 3]), torch.tensor([5, 6, 7, 8, 5, 9]), torch.tensor([0, 0, 4, 4]))
    s, b = torch.tensor([math.log(scale)]).requires_grad_(), torch.tensor([bias]).requires_grad_()
    output = Sigmoid()(q, d, rows, s, logit_bias=b)
    grads = torch.autograd.grad(output.loss, [q, d, s, b])
    assert output.loss.isfinite()
    assert all(g.isfinite().all() for g in grads)


def test_late_interaction_compares_vectors() -> None:
    q, d = embeddings(12, 1).view(3, 4, 6), embeddings(20, 2).view(4, 5, 6)
    rows = RowInfo.distinct(3, 4)
    output = Sigmoid(SigmoidConfig(similarity="maxsim", temperature=0.5, bias=-1.0, **FIXED))(q, d, rows)
    unit_q, unit_d = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (q, d))
    s_bm = torch.einsum("bld,mkd->bmlk", unit_q, unit_d).amax(3).sum(2)
    expected = naive(s_bm, rows, torch.tensor([2.0]), torch.tensor([-1.0]), "negative")
    assert_equal(output.loss, expected, [q, d])


def test_what_is_learned_starts_from_the_configuration() -> None:
    loss = Sigmoid()
    initial = {part.name: part.mean for part in loss.learned_parts(4)}
    assert initial == {"logit_scale": pytest.approx(math.log(10.0)), "logit_bias": -10.0}
    fixed = Sigmoid(SigmoidConfig(**FIXED))
    assert not fixed.learned_parts(4)


def test_a_learned_temperature_is_bounded() -> None:
    q, d = embeddings(4, 1), embeddings(4, 2)
    loss, bias = Sigmoid(), torch.tensor([-10.0])
    at, above = (loss(q, d, None, torch.tensor([v]), logit_bias=bias) for v in (MAX_LOGIT_SCALE, 9.0))
    assert torch.equal(at.loss, above.loss)


def test_what_is_learned_must_come_from_the_model() -> None:
    q, d = embeddings(3, 1), embeddings(3, 2)
    with pytest.raises(ValueError, match="gives no `logit_scale`"):
        Sigmoid()(q, d, logit_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="gives no `logit_bias`"):
        Sigmoid()(q, d, logit_scale=torch.zeros(1))


def test_no_queries_give_a_loss_of_zero() -> None:
    output = Sigmoid(SigmoidConfig(**FIXED))(embeddings(0, 1), embeddings(0, 2))
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert len(output.metrics) == 5
    assert not any(float(v) for v in output.metrics.values())


def test_it_is_registered() -> None:
    assert isinstance(create_loss("sigmoid"), Sigmoid)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"temperature": float("inf")}, "`temperature` must be finite"),
        ({"bias": math.nan}, "`bias` must be finite"),
        ({"same": "keep"}, "`same` must be one of mask, positive, negative, but is 'keep'"),
        ({"similarity": "l2"}, "`similarity` must be one of cosine, dot"),
        ({"negatives": "all"}, "`negatives` must be one of global, local"),
    ],
)
def test_a_wrong_configuration_is_an_error(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sigmoid(SigmoidConfig(**values))

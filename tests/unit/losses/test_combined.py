"""Several objectives at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from vembed_fs2.embedding.learned import LearnedPart
from vembed_fs2.losses import (
    Combined,
    CombinedConfig,
    Distillation,
    EmbeddingDistillation,
    InfoNCE,
    InfoNCEConfig,
    LossInput,
    LossOutput,
    Matryoshka,
    MatryoshkaConfig,
    Objective,
    WeightedLossSpec,
    create_loss,
)

from .test_matryoshka import DIM, Remembering, random, rows_of


def test_value_and_gradients_are_the_weighted_sum() -> None:
    q, d, scale = random(0, 4, DIM), random(1, 8, DIM), torch.tensor([1.5])
    leaves = [x.requires_grad_() for x in (q, d, scale)]
    rows = rows_of(4, 8)
    parts = {"infonce": InfoNCE(InfoNCEConfig(learn_temperature=True)), "distillation": Distillation()}
    output = Combined(parts, {"distillation": 0.3})(q, d, rows, scale)
    one, other = (part(q, d, rows, scale) for part in parts.values())
    expected = one.loss + 0.3 * other.loss
    torch.testing.assert_close(output.loss, expected)
    got, reference = (torch.autograd.grad(x, leaves) for x in (output.loss, expected))
    torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)
    assert output.metrics.keys() == {
        *one.metrics, "infonce/loss", "distillation/loss", *(f"distillation/{name}" for name in other.metrics)
    }  # fmt: skip
    torch.testing.assert_close(output.metrics["distillation/loss"], other.loss.detach())
    torch.testing.assert_close(output.metrics["accuracy"], one.metrics["accuracy"])


def test_no_two_graphs_are_in_memory() -> None:
    shared = Remembering()
    Combined({"a": shared, "b": shared})(random(0, 3, DIM).requires_grad_(), random(1, 3, DIM)).loss.backward()
    assert shared.alive_before == [0, 0]


def test_can_be_nested_both_ways() -> None:
    q, d, rows = random(0, 4, DIM).requires_grad_(), random(1, 8, DIM).requires_grad_(), rows_of(4, 8)
    outside = Matryoshka(Combined({"infonce": InfoNCE(), "distillation": Distillation()}, {"infonce": 2.0}), [3, DIM])
    parts = {"matryoshka": Matryoshka(InfoNCE(), [3, DIM]), "distilled": Matryoshka(Distillation(), [3, DIM])}
    inside = Combined(parts, {"matryoshka": 2.0})
    values, grads = [], []
    for loss in (outside, inside):
        value = loss(q, d, rows).loss
        values.append(value.detach())
        grads.append(torch.autograd.grad(value, [q, d]))
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    assert {"loss@3", "loss@8", "accuracy", "distillation/agreement"} <= outside(q, d, rows).metrics.keys()
    assert {"loss@3", "loss@8", "accuracy", "distilled/loss@3"} <= inside(q, d, rows).metrics.keys()


def test_two_of_a_name_are_told_apart() -> None:
    specs = [WeightedLossSpec(name="infonce", config=InfoNCEConfig(temperature=t)) for t in (0.05, 0.5)]
    loss = create_loss("combined", CombinedConfig(losses=specs))
    q, d = random(0, 4, DIM), random(1, 4, DIM)
    output = loss(q, d)
    assert float(output.metrics["temperature"]) == pytest.approx(4 * 0.05)
    assert float(output.metrics["infonce_2/temperature"]) == pytest.approx(4 * 0.5)
    torch.testing.assert_close(output.loss, sum(InfoNCE(s.config)(q, d).loss for s in specs))  # type: ignore[arg-type]


def test_what_it_needs_is_what_any_of_them_needs() -> None:
    loss = Combined({"a": InfoNCE(), "b": EmbeddingDistillation(), "c": Distillation()})
    assert loss.needs_teacher
    assert loss.needs_scores
    assert loss.needs_negatives
    assert [part.shape for part in loss.learned_parts(4, 8)] == [(8, 4)]
    assert not loss.learned_parts(8, 8)
    plain = Combined({"a": InfoNCE(), "b": InfoNCE(InfoNCEConfig(temperature=0.2, learn_temperature=True))})
    assert [plain.needs_teacher, plain.needs_scores, plain.needs_negatives] == [False] * 3
    (scale,) = plain.learned_parts(4, 8)
    assert (scale.name, scale.mean) == ("logit_scale", pytest.approx(-math.log(0.2)))
    assert Combined({"a": InfoNCE(), "b": Matryoshka(InfoNCE(), [9])}).dim_errors(8)


class Biased(Objective):
    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        return [LearnedPart(name="logit_bias", mean=-10.0)]

    def compute(self, inputs: LossInput) -> LossOutput:
        return LossOutput(inputs.get_part("logit_bias").sum() * inputs.query.sum(), {})


def test_a_learned_bias_gets_its_gradient() -> None:
    q, bias = random(0, 4, DIM), torch.tensor([2.0], requires_grad=True)
    loss = Combined({"a": Biased(), "b": InfoNCE()})
    assert [(part.name, part.mean) for part in loss.learned_parts(DIM)] == [("logit_bias", -10.0)]
    loss(q, random(1, 4, DIM), logit_bias=bias).loss.backward()
    torch.testing.assert_close(bias.grad, q.sum().reshape(1))


def test_a_model_has_one_temperature() -> None:
    """Two objectives that want to start it from different values cannot both be right."""
    parts = {str(t): InfoNCE(InfoNCEConfig(temperature=t, learn_temperature=True)) for t in (0.05, 0.1)}
    with pytest.raises(ValueError, match="share the model's learned `logit_scale`"):
        Combined(parts)


def test_values_that_are_not_valid_are_errors() -> None:
    with pytest.raises(ValueError, match="`losses` must hold at least one objective"):
        Combined({})
    for weights in ({"b": 1.0}, {"a": 0.0}, {"a": math.inf}):
        with pytest.raises(ValueError, match="`weights` must hold positive numbers for a"):
            Combined({"a": InfoNCE()}, weights)
    assert CombinedConfig().errors() == ["`losses` must hold at least one objective."]
    inner = MatryoshkaConfig(dims=[4, 8], weights=[1.0], loss=WeightedLossSpec(name="infonce"))
    inner.loss.config = InfoNCEConfig(temperature=-1.0)
    specs = [WeightedLossSpec(name="infonce", weight=-1.0), WeightedLossSpec(name="matryoshka", config=inner)]
    assert CombinedConfig(losses=specs).errors() == [
        "`losses[0].weight` must be positive, but is -1.0.",
        "`losses[1].config.weights` must have an entry for each of the 2 `dims`, but has 1.",
        "`losses[1].config.loss.config.temperature` must be positive, but is -1.0.",
    ]

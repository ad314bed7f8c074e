"""Decay groups and schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fairseq2.models.utils.ac import apply_layerwise_ac
from fairseq2.recipe.config import AdamWGroupConfig
from torch import nn
from torch.optim import AdamW

from vembed_fs2.errors import ConfigError
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.models.bert.factory import create_bert_model
from vembed_fs2.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from vembed_fs2.models.clip.factory import create_clip_model
from vembed_fs2.recipes.optim import EmbeddingAdamWConfig, WarmupDecay, WarmupDecayConfig, schedule, split_decay


def bert() -> nn.Module:
    return create_bert_model(
        BertConfig(model_dim=16, max_seq_len=8, vocab_size=20, num_layers=1, num_attn_heads=2, ffn_inner_dim=24)
    )


def clip() -> nn.Module:
    small: dict[str, Any] = {"model_dim": 16, "num_layers": 1, "num_attn_heads": 2, "ffn_inner_dim": 24}
    config = ClipConfig(
        text=ClipTextConfig(vocab_size=20, max_seq_len=8, **small),
        vision=ClipVisionConfig(image_size=8, patch_size=4, **small),
        projection_dim=12,
    )
    return create_clip_model(config)


def by_decay(model: nn.Module, config: EmbeddingAdamWConfig) -> dict[str, tuple[float, float]]:
    """The learning rate and the decay of each parameter."""
    optimizer = AdamW(split_decay(model, config), lr=config.lr, weight_decay=config.weight_decay)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("create", [bert, clip])
def test_norms_biases_and_temperatures_do_not_decay(create: Any) -> None:
    model = create()
    found = by_decay(model, EmbeddingAdamWConfig(weight_decay=0.3))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys()
    for name, parameter in trained.items():
        is_vector = name.endswith("bias") or "norm" in name or "logit_scale" in name or "class_embed" in name
        assert is_vector == (parameter.ndim <= 1), name
        assert found[name][1] == (0.0 if is_vector else 0.3), name


def test_groups_have_values_of_their_own_and_vectors_still_do_not_decay() -> None:
    model = clip()
    groups = [
        AdamWGroupConfig(params=[r"text\..*"], lr=1e-3),
        AdamWGroupConfig(params=r".*pos_embed.*", weight_decay=0.5),
    ]
    found = by_decay(model, EmbeddingAdamWConfig(lr=1e-5, weight_decay=0.1, groups=groups))
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found["text.proj.weight"] == (1e-3, 0.1)
    assert found["text.frontend.pos_embed.weight"] == (1e-3, 0.1)  # The first group that matches.
    assert found["text.encoder.layer_norm.bias"] == (1e-3, 0.0)
    assert found["vision.frontend.pos_embed.weight"] == (1e-5, 0.5)
    assert found["vision.proj.weight"] == (1e-5, 0.1)
    assert found["logit_scale"] == (1e-5, 0.0)


def test_frozen_parameters_are_left_out() -> None:
    model = clip()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vision."))
    assert all(name.startswith("vision.") for name in by_decay(model, EmbeddingAdamWConfig()))


def factors(num_steps: int, **values: Any) -> list[float]:
    factor = schedule(WarmupDecayConfig(**values), num_steps)
    return [factor(step) for step in range(num_steps + 1)]


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 4}, {"warmup_ratio": 0.2}, {"warmup_steps": 4, "warmup_ratio": 0.9}]
)
def test_schedules_rise_in_a_line_and_fall_as_named(decay: Any, warmup: dict[str, Any]) -> None:
    found = factors(20, decay=decay, **warmup)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[12] == pytest.approx({"cosine": 0.5, "linear": 0.5, "constant": 1.0}[decay])
    assert found[8] == pytest.approx({"cosine": (1 + math.cos(math.pi / 4)) / 2, "linear": 0.75, "constant": 1}[decay])
    assert found[20] == pytest.approx(1.0 if decay == "constant" else 0.0)


def test_schedules_end_at_the_final_scale_and_stay_there() -> None:
    for decay in ("cosine", "linear"):
        config = WarmupDecayConfig(decay=decay, warmup_steps=0, final_lr_scale=0.1)  # type: ignore[arg-type]
        factor = schedule(config, 10)
        assert factor(0) == 1.0
        assert [factor(10), factor(50)] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("values", [{"warmup_ratio": 1.0}, {"warmup_steps": 100}, {"warmup_steps": 0}])
def test_extreme_warmups_stay_between_zero_and_one(values: dict[str, Any]) -> None:
    assert all(0.0 <= f <= 1.0 for steps in (1, 2, 10) for f in factors(steps, **values))


def test_a_schedule_resumes_where_it_was() -> None:
    def create() -> tuple[AdamW, WarmupDecay]:
        layer = nn.Linear(2, 2)
        optimizer = AdamW([{"params": [layer.weight], "lr": 1.0}, {"params": [layer.bias], "lr": 0.5}])
        return optimizer, WarmupDecay(optimizer, schedule(WarmupDecayConfig(warmup_steps=3), 12))

    optimizer, scheduler = create()
    rates = []
    for _ in range(12):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert [r[1] for r in rates] == pytest.approx([r[0] / 2 for r in rates])

    optimizer, scheduler = create()
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    state = torch.utils._pytree.tree_map(lambda x: x, (optimizer.state_dict(), scheduler.state_dict()))
    assert not any(callable(v) for v in state[1].values())
    optimizer, scheduler = create()
    optimizer.load_state_dict(state[0])
    scheduler.load_state_dict(state[1])
    again = []
    for _ in range(7):
        again.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    assert again == rates[5:]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (EmbeddingAdamWConfig(lr=0.0), "lr"),
        (EmbeddingAdamWConfig(lr=math.nan), "lr"),
        (EmbeddingAdamWConfig(weight_decay=-1.0), "weight_decay"),
        (EmbeddingAdamWConfig(weight_decay=math.inf), "weight_decay"),
        (EmbeddingAdamWConfig(eps=-1e-8), "eps"),
        (EmbeddingAdamWConfig(betas=(0.9, 1.0)), "betas"),
        (EmbeddingAdamWConfig(groups=[AdamWGroupConfig(params=".*", lr=-1e-3)]), "groups[0].lr"),
        (EmbeddingAdamWConfig(groups=[AdamWGroupConfig(params=".*", betas=(-1.0, 0.9))]), "groups[0].betas"),
        (WarmupDecayConfig(warmup_steps=-1), "warmup_steps"),
        (WarmupDecayConfig(warmup_ratio=1.5), "warmup_ratio"),
        (WarmupDecayConfig(final_lr_scale=-0.1), "final_lr_scale"),
    ],
)
def test_wrong_values_are_errors_that_name_the_field(config: Any, field: str) -> None:
    assert f"`{field}` must" in str(config.validate())


def test_groups_go_by_the_models_own_names_inside_checkpointed_layers() -> None:
    model = clip()
    for tower in (model.text, model.vision):
        apply_layerwise_ac(tower.encoder.layers, 1)  # type: ignore[arg-type,union-attr]
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    group = AdamWGroupConfig(params=r"text\.encoder\.layers\.0\.self_attn\.", lr=1e-3)
    found = by_decay(model, EmbeddingAdamWConfig(lr=1e-5, groups=[group]))
    faster = {name.replace("_checkpoint_wrapped_module.", "") for name, (lr, _) in found.items() if lr == 1e-3}
    expected = {name for name, _ in clip().named_parameters() if name.startswith("text.encoder.layers.0.self_attn.")}
    assert faster == expected


def test_groups_that_nothing_belongs_to_are_all_named() -> None:
    model = clip()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("vision."))
    groups = [
        AdamWGroupConfig(params=["text"], lr=1e-3),
        AdamWGroupConfig(params=["vision"], lr=1e-3),
        AdamWGroupConfig(params=r"text\.proj", lr=1e-4),
    ]
    with pytest.raises(ConfigError) as caught:
        split_decay(model, EmbeddingAdamWConfig(groups=groups))
    assert caught.value.errors == [
        "`groups[1].params` ['vision'] matches no parameter that is trained and in no earlier group.",
        r"`groups[2].params` 'text\\.proj' matches no parameter that is trained and in no earlier group.",
    ]
    result = EmbeddingAdamWConfig(groups=[AdamWGroupConfig(params="(", lr=1e-3)]).validate()
    assert "`groups[0].params`: '(' is not a valid regular expression" in str(result)

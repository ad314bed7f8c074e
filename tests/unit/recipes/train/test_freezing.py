"""`freeze`: embeddings, first layers and patterns, of every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fairseq2.models import ModelFamily
from torch.nn import Dropout, Module

from tests.unit.models.test_composed import CONFIG, IMAGE
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import ConfigError
from vembed_fs2.models.composed import create_composed_model
from vembed_fs2.recipes.train.config import FreezeSection
from vembed_fs2.recipes.train.model import count_parameters, freeze_parameters
from vembed_fs2.recipes.train.objective import create_blank
from vembed_fs2.resolver import get_resolver

EMBEDDINGS = {
    "bert": ["frontend", "relative_positions"],
    "modernbert": ["frontend"],
    "vit": ["frontend"],
    "auto": ["wrapped.embeddings", "wrapped.embeddings_project"],
    "clip": ["text.frontend", "vision.frontend"],
    "siglip": ["text.frontend", "vision.frontend"],
    "eva": ["text.frontend", "vision.frontend"],
}
"""The modules of each family that come before the layers."""


def blank(family: str) -> EmbeddingModel:
    name = f"vembed_{family}"
    models = get_resolver().resolve(ModelFamily, key=name)
    return create_blank(name, models.maybe_get_arch_config(sorted(models.get_archs())[0]))


def frozen(model: EmbeddingModel, **section: Any) -> set[str]:
    """The parameters that a section freezes, without those that the family freezes itself."""
    before = model.frozen_parameters
    freeze_parameters(model, FreezeSection(**section))
    model.requires_grad_(True)  # As fairseq2 does after loading.
    found = {name for name, p in model.named_parameters() if not p.requires_grad}
    model.frozen_parameters = before
    model.requires_grad_(True)
    return found - before


def within(model: EmbeddingModel, modules: list[str]) -> set[str]:
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name for name in names if name.startswith(tuple(f"{module}." for module in modules))}


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_embeddings_and_first_layers_of_every_family(family: str) -> None:
    model = blank(family)
    names = {id(module): name for name, module in model.named_modules()}
    embeddings = within(model, EMBEDDINGS[family])
    assert embeddings
    assert frozen(model, embeddings=True) == embeddings

    for num_layers in (2, min(map(len, model.layer_stacks()))):
        first = [f"{names[id(stack)]}.{i}" for stack in model.layer_stacks() for i in range(num_layers)]
        assert frozen(model, layers=num_layers) == embeddings | within(model, first)


def test_the_encoders_of_a_composed_model() -> None:
    model = create_composed_model(replace(CONFIG, image=replace(IMAGE, freeze="all")))
    first = ["text.backbone.frontend", "text.backbone.encoder.layers.0"]
    assert frozen(model, layers=1) == within(model, first)

    freeze_parameters(model, FreezeSection(layers=1))
    model.train()
    assert not model.text.backbone.get_submodule("frontend").training
    assert not model.image.backbone.training
    assert model.text.backbone.get_submodule("encoder.layers.1").training
    assert model.image.projection.training


def test_patterns_match_the_beginnings_of_names() -> None:
    model = blank("clip")
    assert frozen(model, params=["vision\\.", "text.front"]) == within(model, ["vision", "text.frontend"])
    # What an objective learns is the objective's affair.
    assert frozen(model, params=[".*"]) == within(model, ["vision", "text"])


def test_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        freeze_parameters(blank("clip"), FreezeSection(layers=99, params=["vison", "text", "logit_scale"]))
    assert "`freeze` is not valid" in str(caught.value)
    text, vision, *patterns = caught.value.errors
    assert text.startswith("`layers` must be at most ")
    assert text.endswith("which `text` has, but is 99 instead.")
    assert "which `vision` has" in vision
    assert [p.partition(" matches no parameter")[0] for p in patterns] == [
        "`params`: 'vison'",
        "`params`: 'logit_scale'",
    ]

    result = FreezeSection(layers=-1, params=["("]).validate()
    assert "`layers` must be greater than or equal to 0, but is -1" in str(result)
    assert "'(' is not a valid regular expression" in str(result)


class Stackless(EmbeddingModel):
    modalities = frozenset({"text"})

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2)

    def layer_stacks(self) -> list[torch.nn.ModuleList]:
        return []


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(ConfigError, match="the model has no layers: name what to freeze in `params`"):
        freeze_parameters(Stackless(), FreezeSection(embeddings=True))
    model = Stackless()
    freeze_parameters(model, FreezeSection(params=["first.weight"]))
    assert count_parameters(model) == (2, 6)


def test_what_is_frozen_has_no_dropout() -> None:
    model = blank("bert")
    freeze_parameters(model, FreezeSection(layers=3))
    model.train()

    def training(module: Module) -> set[bool]:
        return {m.training for m in module.modules() if isinstance(m, Dropout) or "Dropout" in type(m).__name__}

    assert training(model.frontend) == {False}  # type: ignore[arg-type]
    stack = model.layer_stacks()[0]
    assert [training(layer) for layer in stack[:4]] == [{False}] * 3 + [{True}]
    assert not model.eval().training

    other = blank("bert").train()
    assert training(other.frontend) == {True}  # type: ignore[arg-type]

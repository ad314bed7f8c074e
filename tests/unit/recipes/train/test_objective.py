"""What the training checks of a model and an objective before anything is written."""

from __future__ import annotations

from typing import Any

import pytest

from vembed_fs2.errors import ConfigError
from vembed_fs2.losses import (
    LOSSES,
    CombinedConfig,
    DistillationConfig,
    InfoNCEConfig,
    LossSpec,
    MatryoshkaConfig,
    SigmoidConfig,
    WeightedLossSpec,
)
from vembed_fs2.recipes.train.config import EmbeddingModelSection, LossSection, TrainConfig
from vembed_fs2.recipes.train.model import plan_model

MAXSIM = LossSpec(name="infonce", config=InfoNCEConfig(similarity="maxsim"))
BOTH = CombinedConfig(losses=[WeightedLossSpec(name="infonce", config=MAXSIM.config), WeightedLossSpec(name="spread")])


def plan(name: str, config: Any, *, several: bool) -> None:
    """Plan the training of a model with one vector per row, or with one per token."""
    head = {"pooling": "none" if several else "mean"}
    model = EmbeddingModelSection(name=None, family="vembed_bert", arch="tiny", config_overrides={"head": head})
    plan_model(TrainConfig(model=model, loss=LossSection(name=name, config=config)))


@pytest.mark.parametrize(
    ("name", "config", "error"),
    [
        ("infonce", MAXSIM.config, "`config.similarity` is 'maxsim'"),
        ("matryoshka", MatryoshkaConfig(loss=MAXSIM, dims=[8]), "`config.loss.config.similarity` is 'maxsim'"),
        ("combined", BOTH, "`config.losses[0].config.similarity` is 'maxsim'"),
    ],
)
def test_maxsim_needs_several_vectors(name: str, config: Any, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(name, config, several=False)
    assert "`loss` is not valid" in str(caught.value)
    assert [e.startswith(error) for e in caught.value.errors] == [True]


@pytest.mark.parametrize(
    ("name", "config", "error"),
    [
        ("sigmoid", SigmoidConfig(), "`config.similarity` must be 'maxsim'"),
        ("distillation", DistillationConfig(similarity="dot"), "`config.similarity` must be 'maxsim'"),
        ("matryoshka", MatryoshkaConfig(dims=[8]), "`config.loss.config.similarity` must be 'maxsim'"),
        ("combined", BOTH, "`config.losses[1].name` is 'spread', which is for one vector per row"),
        *((name, None, f"`name` is '{name}', which is") for name in ("angle", "cosent", "embedding_distillation")),
    ],
)
def test_several_vectors_need_maxsim(name: str, config: Any, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(name, config or LOSSES[name].config_kls(), several=True)
    assert [e.startswith(error) for e in caught.value.errors] == [True]


def test_what_fits_is_planned() -> None:
    plan("matryoshka", MatryoshkaConfig(loss=MAXSIM, dims=[8]), several=True)
    plan("angle", LOSSES["angle"].config_kls(), several=False)

"""Objectives by name, and what a user can write about them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import pytest
from fairseq2.utils.structured import StandardValueConverter

from vembed_fs2.errors import ConfigError
from vembed_fs2.losses import (
    LOSSES,
    CombinedConfig,
    Distillation,
    InfoNCE,
    InfoNCEConfig,
    Matryoshka,
    MatryoshkaConfig,
    create_loss,
)
from vembed_fs2.recipes.components import Components
from vembed_fs2.recipes.layers import merge_layers, structure
from vembed_fs2.recipes.train.config import TrainConfig
from vembed_fs2.recipes.train.recipe import create_recipe

# What cannot be created without being told more.
NEEDS_MORE = {"combined": "`losses` must hold", "matryoshka": "`dims` must hold"}


@cache
def train_components() -> Components:
    return Components(create_recipe())


def read(loss: object, *more: object) -> TrainConfig:
    """Read the `loss` section of one file or of several."""
    components = train_components()
    defaults: Any = StandardValueConverter().unstructure(TrainConfig())
    layers: list[Any] = [{"loss": layer} for layer in (loss, *more)]
    config: TrainConfig = structure(TrainConfig, merge_layers(defaults, layers), components.find_config)
    components.resolve(config)
    return config


def errors_of(loss: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(loss)
    return caught.value.errors


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_objective_has_a_config_with_defaults_and_documented_fields(name: str) -> None:
    config = LOSSES[name].config_kls()
    assert is_dataclass(config)
    assert fields(config)
    assert config.errors() == [] if name not in NEEDS_MORE else NEEDS_MORE[name] in config.errors()[0]
    if name in NEEDS_MORE:
        with pytest.raises(ValueError, match=NEEDS_MORE[name]):
            create_loss(name)
    else:
        create_loss(name)
    assert isinstance(read({"name": name}).loss.config, LOSSES[name].config_kls)


def test_an_objective_that_is_not_known_is_an_error() -> None:
    with pytest.raises(KeyError):
        create_loss("no such loss")


NESTED = {
    "name": "matryoshka",
    "config": {
        "dims": [32, 8],
        "weights": [1, 0.5],
        "loss": {
            "name": "combined",
            "config": {
                "losses": [
                    {"name": "infonce", "config": {"temperature": 0.2}},
                    {"name": "distillation", "weight": 0.5},
                ]
            },
        },
    },
}


def test_nested_configurations_become_their_classes() -> None:
    config = read(NESTED).loss.config
    assert isinstance(config, MatryoshkaConfig)
    assert (config.dims, config.weights) == ([32, 8], [1.0, 0.5])
    combined = config.loss.config
    assert isinstance(combined, CombinedConfig)
    assert combined.losses[0].config == InfoNCEConfig(temperature=0.2)
    assert [spec.weight for spec in combined.losses] == [1.0, 0.5]
    loss = create_loss("matryoshka", config)
    assert isinstance(loss, Matryoshka)
    assert loss.needs_scores


def test_a_configuration_that_was_written_is_read_again() -> None:
    config = read(NESTED)
    written: Any = StandardValueConverter().unstructure(config)
    assert StandardValueConverter().unstructure(read(written["loss"])) == written
    assert written["loss"]["config"]["loss"]["config"]["losses"][1]["config"]["temperature"] == 0.05


def test_the_default_of_a_nested_objective_is_infonce() -> None:
    config = read({"name": "matryoshka", "config": {"dims": [8]}}).loss.config
    assert isinstance(config, MatryoshkaConfig)
    assert config.loss.config == InfoNCEConfig()


def test_another_nested_objective_starts_from_its_own_defaults() -> None:
    first = {"name": "matryoshka", "config": {"dims": [8], "loss": {"name": "infonce", "config": {"hardest": 3}}}}
    same = read(first, {"config": {"loss": {"config": {"temperature": 0.2}}}}).loss.config
    other = read(first, {"config": {"loss": {"name": "distillation"}}}).loss.config
    assert isinstance(same, MatryoshkaConfig)
    assert isinstance(other, MatryoshkaConfig)
    assert same.loss.config == InfoNCEConfig(hardest=3, temperature=0.2)
    assert other.loss.config == LOSSES["distillation"].config_kls()
    assert other.dims == [8]


def test_all_nested_errors_are_listed_with_their_keys() -> None:
    assert sorted(errors_of(
        {
            "name": "matryoshka",
            "config": {
                "dims": [8, 4.5],
                "weight": [1],
                "loss": {
                    "name": "combined",
                    "config": {
                        "losses": [
                            {"name": "infonce", "config": {"temprature": 0.1, "hardest": "many"}},
                            {"name": "infonse"},
                            {"weight": 2},
                            {"name": "infonce", "config": [1]},
                            "infonce",
                        ]
                    },
                },
            },
        }
    )) == [
        "`loss.config.dims[1]` must be a whole number, but is 4.5.",
        "`loss.config.loss.config.losses[0].config.hardest` must be a whole number or null, but is 'many'.",
        "`loss.config.loss.config.losses[0].config.temprature` is not a known key. Did you mean"
        " `loss.config.loss.config.losses[0].config.temperature`?",
        "`loss.config.loss.config.losses[1].name` 'infonse' is not known. Did you mean 'infonce'?",
        "`loss.config.loss.config.losses[2].name` is missing.",
        "`loss.config.loss.config.losses[3].config` must hold keys and values, but is [1].",
        "`loss.config.loss.config.losses[4]` must hold keys and values, but is 'infonce'.",
        "`loss.config.weight` is not a known key. Did you mean `loss.config.weights`?",
    ]  # fmt: skip


def test_values_of_nested_objectives_are_checked() -> None:
    config = read({"name": "matryoshka", "config": {"loss": {"name": "infonce", "config": {"temperature": -1}}}})
    assert config.loss.validate().errors == [
        "`config.dims` must hold different numbers of dimensions, each at least 1, but is [].",
        "`config.loss.config.temperature` must be positive, but is -1.0.",
    ]


def test_in_python_objectives_are_put_into_each_other() -> None:
    loss = Matryoshka(InfoNCE(InfoNCEConfig(temperature=0.1)), [8, 4])
    assert not loss.needs_scores
    assert Matryoshka(Distillation(), [8, 4], [1.0, 0.5]).needs_scores

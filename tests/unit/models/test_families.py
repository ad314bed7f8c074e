"""Every family has the same parts, under the same names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from fairseq2.models import ModelFamily, ModelHub
from fairseq2.runtime.dependency import DependencyContainer

import vembed_fs2.models
from vembed_fs2.errors import ConfigError
from vembed_fs2.resolver import get_resolver

FOLDER = Path(vembed_fs2.models.__file__).parent

FAMILIES = sorted(file.parent.name for file in FOLDER.glob("*/archs.py"))

PARTS = ("__init__", "archs", "config", "factory", "interop", "model")


def test_all_families_are_seen() -> None:
    assert {"auto", "bert", "clip", "composed", "eva", "modernbert", "siglip", "vit"} <= set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_has_a_file_that_says_what_it_is(family: str) -> None:
    for part in PARTS:
        source = FOLDER.joinpath(family, f"{part}.py").read_text(encoding="utf-8")
        assert source.startswith('"""'), part


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_exports_the_same_names(family: str) -> None:
    module = import_module(f"vembed_fs2.models.{family}")

    exported = set(module.__all__)
    assert {f"create_{family}_model", f"get_{family}_model_hub", f"register_{family}"} <= exported
    assert all(hasattr(module, name) for name in exported)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_a_hub(family: str) -> None:
    module = import_module(f"vembed_fs2.models.{family}")
    name = getattr(module, f"{family.upper()}_FAMILY")

    hub = getattr(module, f"get_{family}_model_hub")()

    assert isinstance(hub, ModelHub)
    assert isinstance(hub.get_arch_config(sorted(hub.get_archs())[0]), _config_kls(name))


def _config_kls(name: str) -> type:
    return get_resolver().resolve(ModelFamily, key=name).config_kls


@pytest.mark.parametrize("family", FAMILIES)
def test_no_model_is_made_of_a_size_that_is_not_positive(family: str) -> None:
    module = import_module(f"vembed_fs2.models.{family}")
    config = _config_kls(getattr(module, f"{family.upper()}_FAMILY"))()
    names = ("model_dim", "projection_dim", "embedding_dim")
    field = next((name for name in names if hasattr(config, name)), None)
    if field is None:
        pytest.skip("Its sizes are those of its parts, or transformers'.")

    setattr(config, field, 0)

    assert f"`{field}` must be positive, but is 0 instead." in list(config.validate().errors)
    if family != "composed":  # Its parts are created first, of configurations that there are none of here.
        with pytest.raises(ConfigError):
            getattr(module, f"create_{family}_model")(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_registration_takes_a_container_alone(family: str) -> None:
    getattr(import_module(f"vembed_fs2.models.{family}"), f"register_{family}")(DependencyContainer())

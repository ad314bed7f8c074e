"""What every recipe gets from its base class, and the launcher from a recipe."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fairseq2.recipe.base import RecipeContext
from fairseq2.recipe.config import CommonSection, GangSection
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.task import Task

from vembed_fs2.errors import ConfigError
from vembed_fs2.fairseq2_seams import create_recipe_container
from vembed_fs2.recipes.arguments import add_recipe_arguments
from vembed_fs2.recipes.base import VembedRecipe
from vembed_fs2.recipes.launch import load_config, run_recipe


@dataclass
class Fast:
    speed: int = 2


@dataclass
class Section:
    name: str = "fast"
    config: object = field(default_factory=Fast)


@dataclass
class Pair:
    left: Section = field(default_factory=Section)


@dataclass
class ToyConfig:
    engine: Section = field(default_factory=Section)
    gang: GangSection = field(default_factory=GangSection)
    common: CommonSection = field(default_factory=lambda: CommonSection(no_sweep_dir=True))


class ToyTask(Task):
    def __init__(self, file: Path, text: str) -> None:
        self._file, self._text = file, text

    def run(self) -> None:
        self._file.write_text(self._text)

    def request_stop(self) -> None: ...

    def close(self) -> None: ...

    @property
    def step_nr(self) -> int:
        return 0


class ToyRecipe(VembedRecipe[ToyConfig, str]):
    def __init__(self) -> None:
        self.num_prepared = 0

    @property
    def config_kls(self) -> type[object]:
        return ToyConfig

    def components(self, resolver: DependencyResolver) -> Mapping[str, Mapping[str, type[object]]]:
        return {"engine": {"fast": Fast, "pair": Pair}}

    def prepare(self, config: ToyConfig) -> str:
        if config.engine.name == "pair":
            raise ConfigError("there is one engine only.")
        self.num_prepared += 1
        return f"prepared {self.num_prepared}"

    def create_prepared_task(self, context: RecipeContext, prepared: str) -> Task:
        return ToyTask(context.output_dir / "result", prepared)

    def exit_status(self) -> int:
        return 7


def create_recipe() -> ToyRecipe:
    return ToyRecipe()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of somebody else with a recipe."""
    folder = tmp_path / "toy_package"
    folder.joinpath("configs").mkdir(parents=True)
    folder.joinpath("__init__.py").touch()
    folder.joinpath("recipe.py").write_text(f"from {__name__} import create_recipe\n")
    folder.joinpath("configs/faster.yaml").write_text("engine: {config: {speed: 3}}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "toy_package"
    for name in [n for n in sys.modules if n.split(".")[0] == "toy_package"]:
        del sys.modules[name]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    return parser.parse_args(["out", *arguments])


def test_what_a_configuration_names_is_opened_once() -> None:
    recipe, config = ToyRecipe(), ToyConfig()

    assert [recipe.open(config), recipe.open(config)] == ["prepared 1"] * 2
    assert recipe.open(ToyConfig()) == "prepared 2"


def test_a_recipe_names_its_components(package: str) -> None:
    recipe = ToyRecipe()

    assert load_config(package, recipe, parse()).engine.config == Fast(2)
    preset = load_config(package, recipe, parse("--preset", "faster"))
    assert preset.engine.config == Fast(3)
    with pytest.raises(ConfigError, match="Did you mean 'fast'"):
        load_config(package, recipe, parse("--config", "engine.name=fst"))
    with pytest.raises(ConfigError, match=r"`engine\.config\.speeed` is not a known key"):
        load_config(package, recipe, parse("--config", "engine.config.speeed=3"))
    with pytest.raises(ConfigError, match=r"'slow' is not a preset. Presets: faster\."):
        load_config(package, recipe, parse("--preset", "slow"))


def test_a_component_within_another_is_of_the_same_kind(package: str) -> None:
    config = load_config(package, ToyRecipe(), parse("--config", "engine.name=pair", "engine.config.left.name=fast"))

    assert config.engine.config.left.config == Fast(2)
    with pytest.raises(ConfigError, match=r"`engine\.config\.left\.name` 'fst' is not known"):
        load_config(package, ToyRecipe(), parse("--config", "engine.name=pair", "engine.config.left.name=fst"))


def test_presets_of_a_package_without_any_are_none(package: str, tmp_path: Path) -> None:
    for file in tmp_path.glob("toy_package/configs/*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"Presets: none\."):
        load_config(package, ToyRecipe(), parse("--preset", "slow"))


def test_a_mistake_is_an_error_before_anything_is_written(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in ("vembed_fs2.recipes.launch.redact_logs", "fairseq2.logging.configure_logging"):
        monkeypatch.setattr(function, lambda *args, **options: None)
    monkeypatch.chdir(tmp_path)

    assert run_recipe(package, parse("--config", "engine.name=pair")) == 2

    assert "there is one engine only" in capsys.readouterr().err
    assert not tmp_path.joinpath("out").exists()


def test_a_recipe_that_shows_nothing_itself_shows_its_log(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(recipe: ToyRecipe, config: ToyConfig, args: argparse.Namespace) -> int:
        seen.append((args.verbose, recipe.screen.shown))
        return 0

    monkeypatch.setattr("vembed_fs2.recipes.launch._run_fairseq2", run)
    monkeypatch.setattr("vembed_fs2.recipes.launch.redact_logs", lambda environment: None)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.chdir(tmp_path)

    run_recipe(package, parse())
    run_recipe(package, parse("--quiet"))
    monkeypatch.setattr(ToyRecipe, "show_end", lambda self, output_dir: None)
    run_recipe(package, parse())

    assert seen == [(True, False), (False, False), (False, True)]


def test_the_task_gets_what_was_prepared(tmp_path: Path) -> None:
    """Run by the launcher, which has opened the configuration, or by fairseq2 itself, which has not."""
    for opens in (True, False):
        recipe, config = ToyRecipe(), ToyConfig()
        if opens:
            recipe.open(config)
        task: Any = recipe.create_task(Context(config, tmp_path))  # type: ignore[arg-type]
        task.run()

        assert tmp_path.joinpath("result").read_text() == "prepared 1"
        assert recipe.num_prepared == 1


class Context:
    def __init__(self, config: ToyConfig, output_dir: Path) -> None:
        self._config = config
        self.output_dir = output_dir

    def get_config_as(self, kls: type[object]) -> object:
        assert isinstance(self._config, kls)
        return self._config


def test_the_training_recipe_is_created_by_any_container() -> None:
    from vembed_fs2.recipes.train.recipe import create_recipe as create_train_recipe

    recipe = create_train_recipe()
    components = recipe.components(create_recipe_container(recipe))
    assert {"vembed_adamw", "adamw"} <= components["optimizer"].keys()
    assert "infonce" in components["loss"]
    assert recipe.exit_status() == 0

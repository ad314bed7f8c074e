"""What ``fairseq2_seams.py`` reaches for in fairseq2, as it is in 0.8.

Each test fails when fairseq2 changes what its seam needs, or when it no longer
needs one: a class that is open, another public name where one was missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import fairseq2.recipe.composition
import pytest
from fairseq2.error import OperationalError
from fairseq2.models.transformer import StandardFeedForwardNetwork
from fairseq2.nn import BatchLayout
from fairseq2.optim.lr_schedulers import LRScheduler
from fairseq2.recipe import cli
from fairseq2.recipe.base import Recipe, RecipeContext
from fairseq2.recipe.component import ComponentManager, register_component
from fairseq2.recipe.config import ModelSection
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.task import Task
from fairseq2.trainer import Trainer
from fairseq2.utils.stopwatch import Stopwatch
from fairseq2.validator import NOOP_VALIDATOR
from torch.optim import Optimizer

from vembed_fs2.fairseq2_seams import (
    OpenBatchLayout,
    OpenFeedForwardNetwork,
    call_before,
    complete_checkpoint,
    create_recipe_container,
    handle_cli_errors,
    list_components,
    repair_wandb,
    seconds_since_report,
    stop_after_step,
    without_console_log,
)


def public_names(owner: Any) -> set[str]:
    """The names by which fairseq2 would offer what is missing."""
    return {name for name in dir(owner) if not name.startswith("_")}


def functions_of(module: Any) -> set[str]:
    return {name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}


def new_trainer(**members: Any) -> Any:
    """A trainer with some of its members, which has run no constructor."""
    trainer = object.__new__(Trainer)
    vars(trainer).update(members)
    return trainer


@pytest.mark.parametrize(
    ("opened", "closed"), [(OpenBatchLayout, BatchLayout), (OpenFeedForwardNetwork, StandardFeedForwardNetwork)]
)
def test_fairseq2_marks_the_class_final(opened: type[Any], closed: Any) -> None:
    assert issubclass(opened, closed)
    assert vars(closed).get("__final__") is True


@dataclass
class Settings:
    """The configuration of something."""


@dataclass
class TrainSettings:
    model: ModelSection


class SomeRecipe(Recipe):
    def __init__(self, kls: type[object]) -> None:
        self._kls = kls

    @property
    def config_kls(self) -> type[object]:
        return self._kls

    def register(self, container: DependencyContainer) -> None:
        register_component(container, Optimizer, "mine", Settings, lambda resolver, config: None)  # type: ignore[arg-type,return-value]

    def create_task(self, context: RecipeContext) -> Task:
        raise NotImplementedError


def test_components_are_listed_with_what_recipes_register() -> None:
    container = create_recipe_container(SomeRecipe(TrainSettings))

    optimizers = list_components(container, Optimizer)
    assert optimizers["mine"] is Settings
    assert "adamw" in optimizers
    assert "cosine_annealing" in list_components(container, LRScheduler)
    assert public_names(ComponentManager) == {"create_component", "structure_component_config"}


def test_what_only_trains_is_in_the_container_of_a_recipe_that_trains() -> None:
    container = create_recipe_container(SomeRecipe(Settings))

    assert list_components(container, Optimizer) == {"mine": Settings}
    functions = {"register_config_section", "register_dataset", "register_recipe_assets", "register_reference_model"}
    found = {name for name in public_names(fairseq2.recipe.composition) if name.startswith(("register", "create"))}
    assert found == functions | {"register_tokenizer"}


def test_errors_are_reported_as_by_fairseq2s_programs() -> None:
    with pytest.raises(SystemExit) as ended, handle_cli_errors(raises=False):
        raise OperationalError("it failed")
    assert ended.value.code == 1
    with pytest.raises(OperationalError), handle_cli_errors(raises=True):
        raise OperationalError("it failed")

    main = {"main", "train_main", "eval_main", "generate_main"}
    assert {name for name in functions_of(cli) if not name.startswith("_")} == main | {"register_cli_error"}


def test_fairseq2_shows_all_that_is_logged_and_has_no_option_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = import_module("fairseq2.recipe.run")
    assert "    configure_logging(no_rich=no_rich)\n" in inspect.getsource(module.run)
    options = {"checkpoint_dir", "no_rich", "no_progress"}
    assert set(inspect.signature(module.run).parameters) == {"recipe", "config", "output_dir", *options}

    calls: list[bool] = []
    monkeypatch.setattr(module, "configure_logging", lambda no_rich=False: calls.append(no_rich))
    with without_console_log():
        module.configure_logging(no_rich=True)
    assert calls == []
    module.configure_logging(no_rich=True)
    assert calls == [True]


def test_fairseq2_looks_for_a_function_that_wandb_has_moved() -> None:
    module = import_module("fairseq2.recipe.composition.metric_recorders")

    assert "wandb.util.generate_id" in Path(str(module.__file__)).read_text(encoding="utf-8")
    repair_wandb()
    assert len(import_module("wandb.util").generate_id()) == 8


def test_the_trainer_offers_no_more_than_before() -> None:
    """It would be the other way to one of the seams below."""
    hooks = {"register_checkpoint_save_hook", "register_hg_export_hook"}
    assert public_names(Trainer) == {"run", "close", "request_stop", "step_nr", *hooks}


@pytest.mark.parametrize(
    "call",
    [
        "self._lapse_watch = Stopwatch()",
        "self._save_checkpoint(blocking=True)",
        "self._save_checkpoint(blocking)",
        "self._publish_metrics()",
        "self._maybe_complete_checkpoint_save_operation()",
        "self._max_num_steps = max_num_steps",
        "self._validator = validator",
    ],
)
def test_the_trainer_uses_its_own_members_so(call: str) -> None:
    assert call in inspect.getsource(Trainer)


def test_the_time_since_a_report_is_the_trainers() -> None:
    watch = Stopwatch()
    watch.start()

    assert seconds_since_report(new_trainer(_lapse_watch=watch))() > 0.0
    source = inspect.getsource(Trainer._publish_metrics)
    assert source.index("process_metric_values") < source.index('values["lapse_time"]')


def test_a_checkpoint_is_completed() -> None:
    class Manager:
        is_saving = True

        def maybe_complete_save_operation(self, *, blocking: bool) -> None:
            assert blocking
            self.is_saving = False

    manager = Manager()
    complete_checkpoint(new_trainer(_checkpoint_manager=manager))

    assert not manager.is_saving


def test_checks_run_before_what_they_can_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name, parameters in (("_save_checkpoint", ["self", "blocking"]), ("_publish_metrics", ["self"])):
        assert list(inspect.signature(getattr(Trainer, name)).parameters) == parameters
        monkeypatch.setattr(Trainer, name, lambda self, *args, name=name: calls.append(name))
    trainer = new_trainer(_publish_metrics_every_n_steps=1)
    for name in ("_should_save_checkpoint", "_should_publish_metrics"):
        monkeypatch.setattr(Trainer, name, lambda self: True)

    call_before(trainer, save=note(calls, "save"), publish=note(calls, "publish"))
    trainer._maybe_save_checkpoint(blocking=True)
    trainer._maybe_publish_metrics()

    assert calls == ["save", "_save_checkpoint", "publish", "_publish_metrics"]


def note(calls: list[str], name: str) -> Callable[[], None]:
    return lambda: calls.append(name)


def test_the_trainer_overlooks_a_request_to_stop_if_it_knows_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_maybe_save_checkpoint", "_maybe_publish_metrics"):
        monkeypatch.setattr(Trainer, name, lambda self, **options: None)
    validator = object()
    trainer = new_trainer(_step_nr=1, _max_num_steps=9, _validator=validator, _stop_requested=False)
    monkeypatch.setattr(Trainer, "_maybe_validate", lambda self: None)
    trainer.request_stop()

    assert trainer._run_post_step().name == "DATA_LOAD"  # This is the defect.
    stop_after_step(trainer)
    assert trainer._run_post_step().name == "STOP_REQUESTED"
    assert trainer._validator is NOOP_VALIDATOR
    assert not trainer._should_validate()

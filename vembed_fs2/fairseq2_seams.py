"""Each place where this package reaches into fairseq2 0.8: its private names, and the classes that it marks final.

fairseq2 promises nothing about them, so they stand here and nowhere else
(``tests/unit/test_imports.py`` looks). Each has a test in
``tests/unit/test_fairseq2_seams.py`` that fails when fairseq2 changes the name,
or offers another way. Modules of fairseq2 that only a recipe needs are imported
when a function is called: models are loaded without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fairseq2.models.transformer import StandardFeedForwardNetwork
from fairseq2.nn import BatchLayout
from fairseq2.runtime.dependency import DependencyContainer, DependencyResolver

if TYPE_CHECKING:
    from fairseq2.recipe.base import Recipe
    from fairseq2.trainer import Trainer


class OpenBatchLayout(BatchLayout):  # type: ignore[misc]  # final in fairseq2
    """fairseq2's batch layout, open to subclasses.

    Attention takes no other type, and the ones that we add know a batch by its
    mask or its packed positions, which fairseq2's does not hold.
    """


class OpenFeedForwardNetwork(StandardFeedForwardNetwork):  # type: ignore[misc]  # final in fairseq2
    """fairseq2's feed-forward network, open to subclasses.

    Its sharding, its names of parameters and its other options are as they
    should be; only the order in which inference computes it is ours.
    """


def create_recipe_container(recipe: Recipe) -> DependencyContainer:
    """Return a container with all that fairseq2, its extensions and a recipe register, for looking things up.

    fairseq2 makes such a container only when it runs the recipe. A
    configuration is checked before, against the components in it.
    """
    from fairseq2.composition import _register_library
    from fairseq2.recipe.composition import _register_inference_recipe, _register_train_recipe
    from fairseq2.recipe.internal.config import _is_train_config

    container = DependencyContainer()
    _register_library(container, no_progress=True)
    register = _register_train_recipe if _is_train_config(recipe.config_kls) else _register_inference_recipe
    register(container, recipe)

    return container


def list_components(resolver: DependencyResolver, interface: type[object]) -> dict[str, type[object]]:
    """Return the components of an interface (``Optimizer``), by name, with the class of their configuration.

    fairseq2's ``ComponentManager`` creates a component whose name one knows, and lists none.
    """
    from fairseq2.recipe.component import _ComponentEntry

    keys = [key for key in resolver.iter_keys(_ComponentEntry) if isinstance(key, tuple) and key[0] is interface]
    return {key[1]: resolver.resolve(_ComponentEntry, key=key).config_kls for key in keys}


@contextmanager
def handle_cli_errors(*, raises: bool) -> Iterator[None]:
    """Report errors as fairseq2's own programs do, and end the process with the status that goes with each.

    fairseq2 has this within its ``main`` only, which reads ``sys.argv``.

    :param raises: whether an error is raised after it was reported, instead of ending the process.
    """
    from fairseq2.recipe.cli import _handle_errors, _register_cli_errors

    container = DependencyContainer()
    _register_cli_errors(container)

    with _handle_errors(container, raises):
        yield


@contextmanager
def without_console_log() -> Iterator[None]:
    """Leave logging as the caller has set it up while ``fairseq2.recipe.run.run`` is called.

    It would show all that is logged, and has no option for less.
    """
    from importlib import import_module

    module: Any = import_module("fairseq2.recipe.run")
    configure_logging = module.configure_logging
    module.configure_logging = lambda no_rich=False: None

    try:
        yield
    finally:
        module.configure_logging = configure_logging


def repair_wandb() -> None:
    """Give W&B the function that fairseq2 looks for; W&B 0.23 and later have it elsewhere."""
    from importlib import import_module

    util: Any = import_module("wandb.util")
    if not hasattr(util, "generate_id"):
        util.generate_id = import_module("wandb.sdk.lib.runid").generate_id


def seconds_since_report(trainer: Trainer) -> Callable[[], float]:
    """Return a function that gives the seconds of training since the last report, without validations.

    The trainer reports them (``lapse_time``) after the unit was asked for its rates, which are over the same time.
    """
    seconds: Callable[[], float] = trainer._lapse_watch.get_elapsed_time
    return seconds


def complete_checkpoint(trainer: Trainer) -> None:
    """Wait until the checkpoint that is being written is complete, if one is.

    An error ends the process, and so would end the writing. Called by all ranks.
    """
    trainer._maybe_complete_checkpoint_save_operation()


def call_before(trainer: Trainer, *, save: Callable[[], None], publish: Callable[[], None]) -> None:
    """Have the trainer call ``save`` before each checkpoint, and ``publish`` before each report, on all ranks.

    fairseq2 has a hook for the time after a checkpoint, which is too late to refuse it.
    """
    seam: Any = trainer
    save_checkpoint, publish_metrics = seam._save_checkpoint, seam._publish_metrics

    def save_checked(blocking: bool) -> None:
        save()
        save_checkpoint(blocking)

    def publish_checked() -> None:
        publish()
        publish_metrics()

    seam._save_checkpoint, seam._publish_metrics = save_checked, publish_checked


def override_stop_request(trainer: Trainer, handle: Callable[[], None]) -> None:
    """Let ``handle`` take the place of the trainer's own ``request_stop``.

    The trainer's looks at a request only if no number of steps is set, on its own rank alone.
    """
    trainer.request_stop = handle  # type: ignore[method-assign]


def stop_after_step(trainer: Trainer) -> None:
    """Ask the trainer to stop after this step, with a checkpoint and without a validation.

    fairseq2's ``request_stop`` is looked at only if no number of steps is set, and the trainer would validate.
    """
    from fairseq2.validator import NOOP_VALIDATOR

    type(trainer).request_stop(trainer)  # Not the instance's, which may be overridden.
    trainer._max_num_steps = None
    trainer._validator = NOOP_VALIDATOR

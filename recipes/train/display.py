"""What a training shows: what is trained on what, how far it is, each validation, and what it has made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from time import monotonic
from typing import Any, Final

import torch
from fairseq2.checkpoint import CheckpointManager
from fairseq2.gang import Gangs
from fairseq2.metrics.recorders import MetricRecorder
from fairseq2.recipe.base import RecipeContext
from fairseq2.trainer import TrainStepHookArgs
from torch.nn import Module
from typing_extensions import override

from vembed_fs2.console import Bar, Screen, format_rate, format_time, short_path
from vembed_fs2.losses.nested import LossSpec
from vembed_fs2.recipes.metrics import METRIC_NAMES, VALID_METRICS
from vembed_fs2.recipes.train.config import EmbeddingModelSection, LossSection, TrainConfig
from vembed_fs2.recipes.train.model import count_parameters

_MAX_PATHS: Final = 3
"""Of more files than these, only the number is shown."""


class TrainDisplay(MetricRecorder):
    """Shows what the trainer reports.

    ::

        Training
          model  ...
        Training  ------  120/1,000 steps, loss 0.4101, lr 2.0e-05, 310 rows/s, 1:02 left
        Step 500: nDCG@10 0.7012, Recall@1 0.5990 (best)
        Step 500: checkpoint in runs/text/checkpoints/step_500
        Trained 1,000 steps in 2:11.

    :param screen: shows nothing on other ranks than the first.
    """

    def __init__(self, screen: Screen, config: TrainConfig, context: RecipeContext) -> None:
        assert config.regime.num_steps is not None
        self._screen = screen
        self._config = config
        self._gangs = context.gangs
        self._output_dir = context.output_dir
        self._num_steps = config.regime.num_steps

        # What fairseq2's trainer resumes from.
        manager = context.resolver.resolve(CheckpointManager)
        self._resumed = manager.maybe_get_last_step_number(exclude_model_only=True)
        self._step = self._resumed or 0

        score = config.regime.score_metric or VALID_METRICS[0]
        self._metrics = [score, *(name for name in VALID_METRICS if name != score)]
        self._best = self._find_best()

        self._started = monotonic()
        self._bar: Bar | None = None
        self._valid_bar: Bar | None = None
        self._saved: Path | None = None

    def start(self, model: Module, facts: Mapping[str, str], steps_per_epoch: int) -> None:
        """Show what is trained on what, and start the bar.

        :param model: the model with all of its parameters.
        :param facts: what is known of ``model`` and ``data``, and of ``validation`` and ``teacher`` if there are.
        """
        config, gangs = self._config, self._gangs
        epochs = self._num_steps / steps_per_epoch

        shown = {
            "model": f"{facts['model']}: {describe_parameters(model)}",
            "data": facts["data"],
            "validation": facts.get("validation"),
            "batch": describe_batch(config, gangs),
            "steps": f"{self._num_steps:,}, {epochs:.3g} {'epoch' if epochs == 1 else 'epochs'} of {steps_per_epoch:,}",
            "objective": describe_loss(config.loss),
            "teacher": facts.get("teacher"),
            "device": describe_device(config, gangs),
            "log": short_path(self._output_dir / "logs"),
        }
        if self._resumed is not None:
            shown["resumed"] = f"from step {self._resumed:,}"
        self._screen.facts("Training", {name: fact for name, fact in shown.items() if fact})

        if self._step < self._num_steps:
            self._bar = self._screen.bar("Training", self._num_steps, unit="steps", done=self._step)

    def begin_step(self, step_nr: int) -> None:
        """Called at the start of each step, with its number from 1 on."""
        if self._bar is not None:
            self._bar.update(step_nr - 1)

    def begin_validation(self, num_inputs: int) -> None:
        """:param num_inputs: how many queries and documents this rank encodes."""
        if self._bar is not None:
            self._bar.pause()
        self._valid_bar = self._screen.bar("Validation", num_inputs, unit="inputs")

    def advance_validation(self, num_inputs: int) -> None:
        """Called after each batch of a validation, with its number of inputs."""
        if self._valid_bar is not None:
            self._valid_bar.advance(num_inputs)

    def show_checkpoint(self, args: TrainStepHookArgs) -> None:
        """Called when a checkpoint is complete."""
        self._saved = self._output_dir / "checkpoints" / f"step_{args.step_nr}"
        self._screen.line(f"Step {args.step_nr:,}: checkpoint in {short_path(self._saved)}")

    @override
    def record_metric_values(self, category: str, values: Mapping[str, object], step_nr: int | None = None) -> None:
        self._step = step_nr or 0
        if category.partition("/")[0] == "valid":
            self._show_validation(values)
        elif self._bar is not None:
            self._bar.rate = 0.0  # Rows, not steps.
            self._bar.facts = describe_report(values)
            self._bar.update(self._step)

    def _show_validation(self, values: Mapping[str, Any]) -> None:
        if self._valid_bar is not None:
            self._valid_bar.close()
        if self._bar is not None:
            self._bar.resume()

        # The two are one if each query has one relevant document, as it mostly has.
        same = "hit@1" not in self._metrics[:1] and values["hit@1"] == values["recall@1"]
        shown = [name for name in self._metrics if not (same and name == "hit@1")]
        numbers = [f"{METRIC_NAMES[name]} {float(values[name]):.4f}" for name in shown]
        score = float(values[self._metrics[0]])
        is_best, self._best = score > self._best, max(score, self._best)

        line = f"Step {self._step:,}: {', '.join(numbers)}{' (best)' if is_best else ''}"
        self._screen.line(line, style="green" if is_best else "")

    def _find_best(self) -> float:
        """The best score of the run's validations before it is resumed."""
        name, best = METRIC_NAMES[self._metrics[0]], float("-inf")
        file = self._output_dir / "metrics" / "valid.jsonl"
        if self._resumed is None or not file.exists():
            return best

        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError):  # A run that is killed leaves half a line.
                row = json.loads(line)
                if row["Step"] <= self._resumed:
                    best = max(best, float(row[name]))

        return best

    def show_end(self, output_dir: Path, stopped_by: str, status: int) -> None:
        """Show how the run has ended, and what can be done next.

        :param output_dir: the run's folder, as the user has given it.
        :param stopped_by: the name of the signal that has stopped the run; "" if it is complete.
        :param status: the exit status.
        """
        first = self._resumed or 0
        if stopped_by:
            saved = "no checkpoint was written" if self._saved is None else f"{short_path(self._saved)} is written"
            self._screen.line(
                f"Stopped by {stopped_by} after step {self._step:,} of {self._num_steps:,}: {saved}. "
                f"The same command resumes. Status {status}.",
                style="bold",
            )
            return

        if first >= self._num_steps:
            self._screen.line(f"The run was complete before: all {self._num_steps:,} steps are done.", style="bold")
        else:
            facts = ", ".join(f"{name} {fact}".strip() for name, fact in self._bar.facts.items()) if self._bar else ""
            took = format_time(monotonic() - self._started)
            self._screen.line(f"Trained {self._step - first:,} steps in {took}: {facts}.", style="bold")

        held_out = " ".join(short_path(path) for path in self._config.valid.paths) or "DATA"
        self._screen.facts(
            f"The model is in {output_dir}. Next:",
            {
                "to measure it": f"fairseq2 vembed evaluate {output_dir} {held_out}",
                "to use it elsewhere": f"fairseq2 vembed export {output_dir} FOLDER",
            },
        )

    @override
    def close(self) -> None:
        for bar in (self._bar, self._valid_bar):
            if bar is not None:
                bar.close()


def describe_report(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the loss, the learning rate and the rows per second of a report, by what is put before them."""
    rates = values["lr"] if isinstance(values["lr"], Sequence) else [values["lr"]]
    different = dict.fromkeys(f"{float(rate):.1e}" for rate in rates)  # Groups of parameters often have the same.

    facts = {"loss": f"{float(values['loss']):.4f}", "lr": " ".join(different)}
    if "queries_per_second" in values:
        facts[""] = f"{format_rate(float(values['queries_per_second']))} rows/s"
    return facts


def describe_model(section: EmbeddingModelSection) -> str:
    """Return what the user calls the model."""
    if section.path is not None:
        return short_path(section.path)
    if section.name is not None:
        return section.name
    return f"{section.family}{'' if section.arch is None else f' {section.arch}'}, new weights"


def describe_data(paths: Sequence[Path], num_rows: int) -> str:
    """Return the number of rows, and where they are from."""
    names = [short_path(path) for path in paths]
    where = ", ".join(names) if len(names) <= _MAX_PATHS else f"{len(names):,} files"
    return f"{num_rows:,} rows of {where}"


def describe_parameters(model: Module) -> str:
    """Return how many parameters a model has, and how many of them are trained."""
    trained, total = count_parameters(model)
    return f"{total:,} parameters, {'all' if trained == total else f'{trained:,}'} trained"


def describe_batch(config: TrainConfig, gangs: Gangs) -> str:
    """Return the number of rows of a step, and what it is made of."""
    counts = {
        "rows": config.dataset.batch_size,
        "processes": gangs.dp.size,
        "batches": config.trainer.grad_accumulation.num_batches,
    }
    factors = [f"{count:,} {what}" for what, count in counts.items() if what == "rows" or count > 1]
    made_of = f" ({' x '.join(factors)})" if len(factors) > 1 else ""
    return f"{prod(counts.values()):,} rows{made_of}"


def describe_loss(loss: LossSection | LossSpec) -> str:
    """Return the objective with the ones in it, for example ``matryoshka(infonce)``."""
    inner = ", ".join(map(describe_loss, _nested(loss.config)))
    return f"{loss.name}({inner})" if inner else loss.name


def _nested(config: object) -> Iterator[LossSpec]:
    for value in vars(config).values() if config is not None else ():
        for element in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(element, LossSpec):
                yield element


def describe_device(config: TrainConfig, gangs: Gangs) -> str:
    """Return the device, the processes, and the type that is computed in."""
    device, size = gangs.device, gangs.root.size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    processes = "1 process" if size == 1 else f"{size:,} processes ({config.trainer.data_parallelism})"

    precision = config.trainer.mixed_precision
    dtype = config.model.dtype if precision.mode == "off" else precision.dtype
    return f"{name}, {processes}, {str(dtype).removeprefix('torch.')}"

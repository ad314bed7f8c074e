"""Training from Python: ``vembed_fs2.train``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from fairseq2.utils.structured import StandardValueConverter, StructureError

from vembed_fs2.data.given import as_paths, write_rows
from vembed_fs2.errors import ConfigError, DataError, VembedError, unpack_error
from vembed_fs2.recipes.arguments import add_recipe_arguments
from vembed_fs2.recipes.folder import ROWS, check_new_or_run, check_writable
from vembed_fs2.recipes.launch import advice_of, command_of, create_config, dump_config
from vembed_fs2.recipes.layers import load_yaml, nest
from vembed_fs2.recipes.presets import load_preset
from vembed_fs2.recipes.processes import Outcome, call_processes
from vembed_fs2.recipes.train.config import DataSection, TrainConfig
from vembed_fs2.recipes.train.recipe import create_recipe
from vembed_fs2.recipes.train.run import TrainingRun

_PACKAGE: Final = "vembed_fs2.recipes.train"


def train(
    folder: str | Path,
    *,
    model: str | Path | None = None,
    data: object = None,
    valid: object = None,
    preset: str | None = None,
    config: object = None,
    nproc_per_node: int | None = None,
    checkpoint_dir: str | Path | None = None,
    quiet: bool = False,
) -> TrainingRun:
    """Train a model, as ``fairseq2 vembed train`` does, and wait for its end.

    .. code:: python

        run = vf.train("runs/first", model="all-MiniLM-L6-v2", data=rows, config={"dataset.batch_size": 32})
        run.embedder().encode(["a text"])

    The training runs in a process of its own, so it may be called in notebooks
    and threads, and any number of times. Values come from, in this order: the
    defaults, ``preset``, ``config``, the other arguments.

    Ctrl-C (a notebook's stop button) ends the training after its step, with a
    checkpoint, and raises ``KeyboardInterrupt``. The same call resumes from the
    last checkpoint, also after an error.

    :param folder: for all that the run writes; a new one, or that of the run to resume.
    :param model: the name of a card, or a Hugging Face, sentence-transformers or run folder.
    :param data: the rows to train on: files or folders, an iterable of dicts, or a table of pandas, polars, Arrow or
        Hugging Face ``datasets``. Rows that are not in files are written to ``folder``, images included.
    :param valid: held-out rows, as ``data``.
    :param preset: the name of a packaged configuration.
    :param config: a mapping of nested or dotted keys, a YAML file, a
        :class:`~vembed_fs2.recipes.train.config.TrainConfig`, or a list of these, of which the later ones win.
    :param nproc_per_node: the number of processes on this machine, for several GPUs.
    :param checkpoint_dir: where checkpoints go, if not into ``folder``.
    :param quiet: if ``True``, only warnings and errors are printed.
    :raises ConfigError: lists everything that is wrong with the configuration.
    :raises VembedError: the training has failed; the message says why, or which file does.
    """
    if nproc_per_node is not None and nproc_per_node < 1:
        raise ConfigError(f"`nproc_per_node` must be at least 1, but is {nproc_per_node}.", where="The call")

    output_dir = Path(folder).expanduser()
    checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir).expanduser()
    for path in filter(None, (output_dir, checkpoint_dir)):
        check_writable(path)

    layers = [load_preset(_PACKAGE, preset, "`preset`")] if preset is not None else []
    layers += _layers_of(config)
    if model is not None:
        layers.append({"model": _find_model(model)})

    rows_folder = output_dir / ROWS
    for section, rows in (("dataset", data), ("valid", valid)):
        if rows is not None:
            layers.append({section: {"paths": list(map(str, as_paths(rows) or [rows_folder]))}})

    settings: TrainConfig = create_config(create_recipe(), layers)

    # Before anything is written to the folder.
    has_checkpoints = check_new_or_run(output_dir)
    _give_rows(data, settings.dataset, rows_folder, "data", "train", replace=not has_checkpoints)
    _give_rows(valid, settings.valid, rows_folder, "valid", "valid", replace=True)

    echo = _find_echo()
    arguments = [str(output_dir), *(["--quiet"] if quiet else []), *([] if echo is None else ["--no-rich"])]
    arguments += [] if checkpoint_dir is None else ["--checkpoint-dir", str(checkpoint_dir)]

    _raise_failure(_run(settings, arguments, nproc_per_node, echo), output_dir)
    return TrainingRun(output_dir)


def _layers_of(config: object) -> list[Mapping[str, Any]]:
    """Return the layers of a configuration in any of its forms.

    :raises ConfigError: it is none of them, or a file cannot be read.
    """
    if config is None:
        return []
    if isinstance(config, (list, tuple)):
        return [layer for part in config for layer in _layers_of(part)]
    if isinstance(config, (str, Path)):
        return [load_yaml(Path(config).expanduser())]

    if not isinstance(config, (Mapping, TrainConfig)):
        kind = type(config).__name__
        raise ConfigError(f"`config` must be a mapping, a YAML file or a `TrainConfig`, but is of type `{kind}`.")

    try:
        values: Any = StandardValueConverter().unstructure(config)
    except StructureError as ex:
        raise ConfigError(f"`config` holds a value that cannot be written to a file: {ex}") from None
    return [nest(values)]


def _find_model(model: str | Path) -> dict[str, str | None]:
    """Say whether a model is a folder or a card, as :meth:`vembed_fs2.Embedder.load` does."""
    if not isinstance(model, (str, Path)):
        raise ConfigError(f"`model` must be a folder or the name of a card, but is of type `{type(model).__name__}`.")

    path = Path(model).expanduser()
    if isinstance(model, Path) or "/" in model or path.exists():
        return {"path": str(path), "name": None}
    return {"name": model, "path": None}


def _give_rows(
    rows: object, section: DataSection, folder: Path, argument: str, file_name: str, *, replace: bool
) -> None:
    """Write rows to a file, if they are not in files, and have the section read it."""
    if rows is None or as_paths(rows) is not None:
        return

    try:
        file = write_rows(
            rows,
            folder,
            file_name,
            columns=section.columns,
            image_root=section.image_root,
            on_error=section.on_error,
            replace=replace,
        )
    except DataError as ex:
        raise DataError(f"`{argument}`: {ex}") from None

    section.paths = [file]
    section.image_root = None  # The images are beside the file now.


def _find_echo() -> Callable[[str], object] | None:
    """Return what prints to this program's own streams, if it has others than its process: notebooks do."""
    if sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__:
        return None

    stream = sys.stdout

    def write(text: str) -> None:
        if stream is not None:
            stream.write(text)
            stream.flush()

    return write


def _run(
    settings: TrainConfig, arguments: list[str], nproc_per_node: int | None, echo: Callable[[str], object] | None
) -> Outcome:
    """Run the command with a configuration, in processes of its own."""
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)

    with TemporaryDirectory(prefix="vembed_") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump_config(settings), encoding="utf-8")
        args = parser.parse_args([*arguments, "--config-file", str(file)])

        count = None if "RANK" in os.environ else nproc_per_node  # Else this process is one of a gang already.
        return call_processes(command_of(_PACKAGE, args), count, advice=advice_of(_PACKAGE), echo=echo)


def _raise_failure(outcome: Outcome, output_dir: Path) -> None:
    """Raise what the processes of a training have reported, or what their end means."""
    if outcome.report:
        raise unpack_error(json.loads(outcome.report))

    if signal.SIGINT in (outcome.signum, outcome.status - 128):
        raise KeyboardInterrupt

    if outcome.signum:
        signal.raise_signal(outcome.signum)  # It was kept from this process so far. It may end it.

    if outcome.explanation is not None:
        raise VembedError(f"The training has failed: {outcome.explanation}")
    if outcome.status >= 128:
        name = signal.Signals(outcome.status - 128).name
        raise VembedError(f"The training was stopped by {name}. {advice_of(_PACKAGE)}")
    if outcome.status:
        log = output_dir / "logs" / "rank_0.log"
        raise VembedError(f"The training has failed. What it printed says why, and {log}. {advice_of(_PACKAGE)}")

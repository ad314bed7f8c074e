"""Runs a recipe: loads its configuration, starts processes, prints errors without stack traces."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from vembed_fs2.errors import ConfigError, VembedError, pack_error
from vembed_fs2.recipes.arguments import add_recipe_arguments
from vembed_fs2.recipes.presets import describe_presets, load_preset
from vembed_fs2.recipes.processes import RESUME, claim_error, defer_error, is_error_claimed, run_processes
from vembed_fs2.recipes.secrets import redact_logs, redactor

if TYPE_CHECKING:
    from vembed_fs2.recipes.base import VembedRecipe

_DISK_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)

_GLOO_LOST: Final = re.compile(r"gloo/transport/.*(closed by peer|reset by peer|Broken pipe)", re.IGNORECASE)
"""Matches gloo's error for a lost peer. Other gloo errors, such as size mismatches, do not match."""


def run_recipe(package: str, args: argparse.Namespace) -> int:
    """Run the recipe of a package, with the command line of :mod:`vembed_fs2.recipes.arguments`.

    :param package: its module ``recipe`` has ``create_recipe``, which returns a
        :class:`~vembed_fs2.recipes.base.VembedRecipe`; presets are YAML files in its folder ``configs``.
    :returns: the exit status: 0, 1 (the run failed), 2 (a user's mistake), or
        128 plus the number of the signal that stopped it.
    """
    try:
        if args.preset == "list":
            print(describe_presets(package))
            return 0

        _check_arguments(args)

        if args.nproc_per_node is not None and "RANK" not in os.environ:
            # Libraries print to the standard output as well.
            stdout = sys.stderr.fileno() if args.quiet else None
            return run_processes(
                command_of(package, args), args.nproc_per_node, advice=advice_of(package), stdout=stdout
            )

        return _run(package, args)
    except VembedError as ex:
        if args.traceback:
            raise
        return _report(ex, 2)


def _check_arguments(args: argparse.Namespace) -> None:
    errors = []
    if args.output_dir is None and not args.dump_config:
        hint = "; give it before --config" if any("=" not in item for item in args.config) else ""
        errors.append(f"OUTPUT_DIR is required{hint}.")

    if args.nproc_per_node is not None and args.nproc_per_node < 1:
        errors.append(f"--nproc-per-node must be at least 1, but is {args.nproc_per_node}.")
    if errors:
        raise ConfigError(errors, where="The command line")


def _report(error: Exception, status: int) -> int:
    """Print an error, unless another process of the gang has printed one."""
    clean, message = redactor(os.environ), _message_of(error)
    if claim_error(status, json.dumps(pack_error(error, message, clean))):
        print(f"error: {clean(message)}", file=sys.stderr)
    return status


def main(package: str) -> None:
    """The entry point of ``python -m <package>``."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}")
    add_recipe_arguments(parser)

    try:
        sys.exit(run_recipe(package, parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit(130)


def advice_of(package: str) -> str:
    """What to do after a process was killed."""
    advice: str = getattr(import_module(package), "ADVICE", "")
    return advice


def command_of(package: str, args: argparse.Namespace) -> list[str]:
    """Return the command that runs a recipe in a process of its own."""
    # Without the working folder, which `-c` adds: a user's `datasets.py` may lie there.
    code = "import sys; sys.path = [p for p in sys.path if p]; from vembed_fs2.recipes.launch import main; "
    return [sys.executable, "-c", f"{code}main({package!r})", *_as_arguments(args)]


def _as_arguments(args: argparse.Namespace) -> list[str]:
    arguments = [str(args.output_dir)] if args.output_dir is not None else []
    arguments += ["--preset", args.preset] if args.preset else []
    for file in args.config_file:
        arguments += ["--config-file", str(file)]

    arguments += ["--checkpoint-dir", str(args.checkpoint_dir)] if args.checkpoint_dir else []
    flags = ("dump_config", "quiet", "verbose", "no_rich", "traceback")
    arguments += [f"--{flag.replace('_', '-')}" for flag in flags if getattr(args, flag)]

    return arguments + (["--config", *args.config] if args.config else [])


def _run(package: str, args: argparse.Namespace) -> int:
    # Heavy imports only now that there is something to do.
    from vembed_fs2.recipes.base import VembedRecipe, load_recipe
    from vembed_fs2.recipes.logs import keep_log, open_screen

    recipe = load_recipe(package)

    config = load_config(package, recipe, args)
    if args.dump_config:
        print(dump_config(config), end="")
        return 0

    redact_logs(os.environ)
    logging.raiseExceptions = False  # A full disk is said once, not with a stack trace for each line that is logged.

    if type(recipe).show_end is VembedRecipe.show_end and not args.quiet:
        args.verbose = True  # The recipe shows nothing itself.

    with open_screen(args) as recipe.screen, keep_log(recipe.screen, args):
        _prepare(recipe, config, args)
        return _run_fairseq2(recipe, config, args)


def _prepare(recipe: VembedRecipe[Any, Any], config: Any, args: argparse.Namespace) -> None:
    """Open what the configuration names, and then the folder of the run."""
    from vembed_fs2.recipes.folder import check_writable, prepare_output_dir

    if is_first := os.environ.get("RANK", "0") == "0":
        for folder in filter(None, (args.output_dir, args.checkpoint_dir)):
            check_writable(folder)

    with recipe.screen.working("Opening the model and the data"):
        prepared = recipe.open(config)

    def complete(values: Mapping[str, Any]) -> Mapping[str, Any]:
        return recipe.complete(prepared, _unstructure(_build_config(recipe, [values])))

    if is_first:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        prepare_output_dir(args.output_dir, args.checkpoint_dir, config, world_size, complete)


def _run_fairseq2(recipe: VembedRecipe[Any, Any], config: Any, args: argparse.Namespace) -> int:
    from fairseq2.model_checkpoint import CorruptModelCheckpointError
    from fairseq2.recipe.run import run

    from vembed_fs2.fairseq2_seams import handle_cli_errors, repair_wandb
    from vembed_fs2.recipes.trackers import describe_wandb_error

    repair_wandb()
    _silence_disk_errors_in_threads()

    with handle_cli_errors(raises=args.traceback):
        try:
            no_progress = None if args.verbose and not args.no_rich else True
            run(recipe, config, args.output_dir, checkpoint_dir=args.checkpoint_dir, no_progress=no_progress)
        except Exception as ex:
            recipe.screen.close()
            if args.traceback:
                raise
            if is_error_claimed():
                return 1  # Only a consequence of what another process has reported.
            if isinstance(ex, (VembedError, CorruptModelCheckpointError)):
                return _report(ex, 2)
            if (text := describe_wandb_error(ex)) is not None:
                return _report(VembedError(text), 2)
            if (cause := find_system_error(ex)) is not None:
                return _report(cause, 1)
            if (lost := find_connection_error(ex)) is not None:
                _leave_to_launcher(lost)

            raise

    recipe.screen.close()
    recipe.show_end(args.output_dir)
    return recipe.exit_status()


def find_system_error(error: BaseException) -> OSError | None:
    """Return the operating system's error, if that is why a run failed: for example a full disk.

    Its ``OSError`` can lie deep: when a checkpoint cannot be written, torch
    raises a ``RuntimeError``, and fairseq2 says that the data cannot be pickled.
    """
    from fairseq2.error import OperationalError

    if isinstance(error, OperationalError) and isinstance(error.__cause__, OSError):
        return error.__cause__

    disk_errors = (ex for ex in _causes(error) if isinstance(ex, OSError) and ex.errno in _DISK_ERRORS)
    return next(disk_errors, None)


def find_connection_error(error: BaseException) -> BaseException | None:
    """Return what torch said, if a run failed because another process could no longer be reached."""
    from torch.distributed import DistBackendError, DistNetworkError

    def is_lost(ex: BaseException) -> bool:
        if isinstance(ex, (DistBackendError, DistNetworkError)):
            return True
        return isinstance(ex, RuntimeError) and _GLOO_LOST.search(str(ex)) is not None

    # Not by the context: while an error is handled, closing the connections may fail as well.
    return next(filter(is_lost, _causes(error, implicit=False)), None)


def _causes(error: BaseException, *, implicit: bool = True) -> Iterator[BaseException]:
    """Yield an error and its causes.

    :param implicit: whether an error that was being handled counts as the cause of another one.
    """
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (link.__context__ if implicit else None)


def _leave_to_launcher(error: BaseException) -> None:
    """Write the error to the log file only, if there is a launcher: the launcher reports the process that failed."""
    reason = redactor(os.environ)(str(error).partition("\n")[0].rstrip("."))
    if defer_error(f"the process of rank {os.environ['RANK']} cannot communicate with the others: {reason}."):
        logging.getLogger("fairseq2").propagate = False


def _silence_disk_errors_in_threads() -> None:
    """Print no stack trace for a full disk in a thread such as TensorBoard's: the main thread reports it."""
    report = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or find_system_error(args.exc_value) is None:
            report(args)

    threading.excepthook = hook


def _message_of(error: Exception) -> str:
    if isinstance(error, VembedError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error}.{f' {RESUME}' if error.errno in _DISK_ERRORS else ''}"

    from fairseq2.model_checkpoint import CorruptModelCheckpointError

    assert isinstance(error, CorruptModelCheckpointError)
    return f"The checkpoint at {error.path} does not fit the model. {error.__cause__ or error}"


def load_config(package: str, recipe: VembedRecipe[Any, Any], args: argparse.Namespace) -> Any:
    """Build the configuration: defaults, then the preset, then the files in order, then ``--config``.

    :raises ConfigError: lists everything that is wrong.
    """
    from vembed_fs2.recipes.layers import load_yaml, parse_overrides

    layers = [load_preset(package, args.preset)] if args.preset else []
    layers += [load_yaml(file) for file in args.config_file]
    layers.append(parse_overrides(args.config))

    return create_config(recipe, layers)


def create_config(recipe: VembedRecipe[Any, Any], layers: Sequence[Mapping[str, Any]]) -> Any:
    """Lay ``layers`` over the defaults of a recipe's configuration, and check the values.

    :raises ConfigError: lists everything that is wrong.
    """
    from vembed_fs2.models.family import config_errors

    config = _build_config(recipe, layers)
    if errors := config_errors(config):
        raise ConfigError(errors)

    return config


def _build_config(recipe: VembedRecipe[Any, Any], layers: Sequence[Mapping[str, Any]]) -> Any:
    """Lay ``layers`` over the defaults of a recipe's configuration.

    :raises ConfigError: keys are unknown, or values are of a wrong type.
    """
    from vembed_fs2.models.family import config_errors
    from vembed_fs2.recipes.components import Components
    from vembed_fs2.recipes.layers import merge_layers, structure, structure_sections

    kls, components = recipe.config_kls, Components(recipe)
    values = merge_layers(_unstructure(kls()), layers)
    try:
        config = structure(kls, values, components.find_config)
    except ConfigError as ex:
        # What is wrong with the values of other sections is said as well.
        sections = structure_sections(kls, values, components.find_config)
        components.resolve(SimpleNamespace(**sections))
        others = [error for name, section in sections.items() for error in config_errors(section, f"{name}.")]
        raise ConfigError([*ex.errors, *others]) from None

    components.resolve(config)
    return config


def _unstructure(config: object) -> Mapping[str, Any]:
    from fairseq2.utils.structured import StandardValueConverter

    values = StandardValueConverter().unstructure(config)
    assert isinstance(values, Mapping)
    return values


def dump_config(config: Any) -> str:
    """Return the configuration as YAML that ``--config-file`` reads."""
    from io import StringIO

    from fairseq2.utils.structured import StandardValueConverter
    from ruamel.yaml import YAML

    stream = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(StandardValueConverter().unstructure(config), stream)

    return stream.getvalue()

"""Runs a recipe: loads its configuration, starts processes, prints errors without stack traces."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from vembed_fs2.errors import ConfigError, VembedError
from vembed_fs2.recipes.arguments import add_recipe_arguments


def run_recipe(recipe: str, args: argparse.Namespace) -> int:
    """Run the recipe in package ``vembed_fs2.recipes.<recipe>``.

    :returns: the exit status: 0, 1 (the run failed), 2 (a user's mistake), or
        128 plus the number of the signal that stopped it.
    """
    if args.preset == "list":
        print("\n".join(_presets(recipe)))
        return 0
    if args.output_dir is None and not args.dump_config:
        print("error: OUTPUT_DIR is required.", file=sys.stderr)
        return 2
    if args.nproc_per_node is not None and "RANK" not in os.environ:
        return _start_processes(recipe, args)
    try:
        return _run(recipe, args)
    except VembedError as ex:
        if args.traceback:
            raise
        print(f"error: {ex}", file=sys.stderr)
        return 2


def main(recipe: str) -> None:
    """The entry point of ``python -m vembed_fs2.recipes.<recipe>``."""
    parser = argparse.ArgumentParser(prog=f"python -m vembed_fs2.recipes.{recipe}")
    add_recipe_arguments(parser)
    sys.exit(run_recipe(recipe, parser.parse_args()))


def _presets(recipe: str) -> list[str]:
    folder = files(f"vembed_fs2.recipes.{recipe}.configs")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def _start_processes(recipe: str, args: argparse.Namespace) -> int:
    if args.nproc_per_node < 1:
        print(f"error: --nproc-per-node must be at least 1, but is {args.nproc_per_node}.", file=sys.stderr)
        return 2
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={args.nproc_per_node}", "-m", f"vembed_fs2.recipes.{recipe}"]
    command += _as_arguments(args)
    # Without this, torchrun gives each process one thread and says so.
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // args.nproc_per_node, 1)))
    process = subprocess.Popen(command, env=env)
    return _wait(process)


def _wait(process: Any) -> int:
    """Wait for torchrun; pass on the signals that ask us to stop."""
    import signal

    stopped_by = 0

    def forward(signum: int, frame: object) -> None:
        nonlocal stopped_by
        stopped_by = signum
        if signum == signal.SIGTERM:  # Ctrl-C reaches the whole process group by itself.
            process.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, forward)
    status: int = process.wait()
    return 128 + stopped_by if stopped_by else status


def _as_arguments(args: argparse.Namespace) -> list[str]:
    arguments = [str(args.output_dir)] if args.output_dir is not None else []
    arguments += ["--preset", args.preset] if args.preset else []
    for file in args.config_file:
        arguments += ["--config-file", str(file)]
    arguments += ["--checkpoint-dir", str(args.checkpoint_dir)] if args.checkpoint_dir else []
    arguments += [
        f"--{flag.replace('_', '-')}" for flag in ("dump_config", "no_rich", "traceback") if getattr(args, flag)
    ]
    return arguments + (["--config", *args.config] if args.config else [])


def _run(recipe_name: str, args: argparse.Namespace) -> int:
    # Heavy imports only now that there is something to do.
    from importlib import import_module

    from fairseq2.error import OperationalError
    from fairseq2.model_checkpoint import CorruptModelCheckpointError
    from fairseq2.recipe.cli import _handle_errors, _register_cli_errors
    from fairseq2.recipe.run import run
    from fairseq2.runtime.dependency import DependencyContainer

    module = import_module(f"vembed_fs2.recipes.{recipe_name}.recipe")
    recipe = module.create_recipe()
    config = load_config(recipe_name, recipe.config_kls, args)
    if args.dump_config:
        print(dump_config(config), end="")
        return 0
    recipe.prepare_config(config)
    check_output_dir(args.output_dir, args.checkpoint_dir, config)
    redact_secrets(os.environ)
    container = DependencyContainer()
    _register_cli_errors(container)
    with _handle_errors(container, args.traceback):
        try:
            run(recipe, config, args.output_dir, checkpoint_dir=args.checkpoint_dir, no_rich=args.no_rich)
        except (VembedError, CorruptModelCheckpointError, OperationalError) as ex:
            if args.traceback or (isinstance(ex, OperationalError) and not isinstance(ex.__cause__, OSError)):
                raise
            print(f"error: {_message_of(ex)}", file=sys.stderr)
            return 2 if isinstance(ex, VembedError) else 1
    return recipe.exit_status()


def _message_of(error: Exception) -> str:
    from fairseq2.model_checkpoint import CorruptModelCheckpointError

    if isinstance(error, CorruptModelCheckpointError):
        return f"The checkpoint at {error.path} does not fit the model. {error.__cause__ or error}"
    if isinstance(error.__cause__, OSError):
        return f"{error.__cause__}. Checkpoints that were complete are intact; run the same command again to resume."
    return str(error)


def load_config(recipe: str, kls: type[Any], args: argparse.Namespace) -> Any:
    """Build the configuration: defaults, then the preset, then the files in order, then ``--config``.

    :raises ConfigError: lists everything that is wrong.
    """
    from fairseq2.utils.structured import StandardValueConverter
    from fairseq2.utils.validation import StandardObjectValidator, ValidationError

    from vembed_fs2.recipes.layers import load_yaml, merge_layers, parse_overrides, structure

    layers: list[Mapping[str, Any]] = []
    if args.preset:
        if args.preset not in _presets(recipe):
            known = ", ".join(_presets(recipe))
            raise ConfigError(f"'{args.preset}' is not a preset. Presets: {known}.", where="--preset")
        layers.append(load_yaml(Path(str(files(f"vembed_fs2.recipes.{recipe}.configs") / f"{args.preset}.yaml"))))
    layers += [load_yaml(file) for file in args.config_file]
    layers.append(parse_overrides(args.config))
    defaults = StandardValueConverter().unstructure(kls())
    assert isinstance(defaults, Mapping)
    config = structure(kls, merge_layers(defaults, layers), component_config)
    resolve_components(config)
    try:
        StandardObjectValidator().validate(config)
    except ValidationError as ex:
        raise ConfigError(_validation_errors(ex.result, "")) from None
    return config


def _validation_errors(result: Any, path: str) -> list[str]:
    errors = [f"`{path.rstrip('.')}`: {e}" if path else e for e in result.errors]
    for name, sub_result in result.sub_results.items():
        errors += _validation_errors(sub_result, f"{path}{name}.")
    return errors


def component_config(section: str, name: str) -> type[Any] | None:
    """Return the configuration class of a component.

    :raises ConfigError: there is no component of that name.
    """
    from difflib import get_close_matches

    known = _components(section)
    if name in known:
        return known[name]
    nearest = get_close_matches(name, known, 1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else f" Known: {', '.join(sorted(known))}."
    raise ConfigError(f"`{section}.name` '{name}' is not known.{hint}")


def _components(section: str) -> dict[str, type[Any]]:
    from fairseq2.optim.lr_schedulers import LRScheduler
    from fairseq2.recipe.component import _ComponentEntry
    from torch.optim import Optimizer

    from vembed_fs2.losses import LOSSES

    if section == "loss":
        return {name: entry.config_kls for name, entry in LOSSES.items()}
    interface = {"optimizer": Optimizer, "lr_scheduler": LRScheduler}[section]
    container = recipe_container()
    found = {}
    for key in container.iter_keys(_ComponentEntry):
        if isinstance(key, tuple) and key[0] is interface:
            found[key[1]] = container.resolve(_ComponentEntry, key=key).config_kls
    return found


@cache
def recipe_container() -> Any:
    """A container with all that fairseq2, its extensions and our recipes register; for looking things up."""
    from fairseq2.composition import _register_library
    from fairseq2.recipe.composition import _register_train_recipe
    from fairseq2.runtime.dependency import DependencyContainer

    from vembed_fs2.recipes.train.recipe import create_recipe

    container = DependencyContainer()
    _register_library(container, no_progress=True)
    _register_train_recipe(container, create_recipe())
    return container


def resolve_components(config: Any) -> None:
    """Convert the ``config`` of each section that names a component to that component's class."""
    from fairseq2.utils.structured import StandardValueConverter

    for section in ("optimizer", "lr_scheduler", "loss"):
        value = getattr(config, section, None)
        if value is not None:
            kls = component_config(section, value.name)
            value.config = StandardValueConverter().structure(value.config, kls)


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


# What may differ when a run is resumed.
_RESUMABLE: Final = ("regime", "common", "gang", "valid", "grad_cache")


def check_output_dir(output_dir: Path, checkpoint_dir: Path | None, config: Any) -> None:
    """Refuse a folder that holds something else than this very run.

    A run that has no checkpoint yet has nothing to lose, and may be started anew.

    :raises ConfigError: says which sections differ.
    """
    from fairseq2.utils.structured import StandardValueConverter

    from vembed_fs2.recipes.layers import load_yaml

    file = output_dir / "config.yaml"
    if not file.exists():
        if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
            raise ConfigError("it holds files, but no run. Give a new folder.", where=str(output_dir))
        return
    checkpoints = checkpoint_dir or output_dir / "checkpoints"
    if not any(checkpoints.glob("step_*")):
        return
    before = load_yaml(file)
    now: Any = StandardValueConverter().unstructure(config)
    differ = [k for k in now if k not in _RESUMABLE and now[k] != before.get(k)]
    if differ:
        text = f"it holds a run with other values in {', '.join(differ)}. Give a new folder, or delete this one."
        raise ConfigError(text, where=str(output_dir))


def redact_secrets(environment: Mapping[str, str]) -> None:
    """Keep the values of environment variables that look like secrets out of all logs.

    fairseq2 logs the whole environment when a recipe starts.
    """
    pattern = re.compile(
        r"TOKEN|SECRET|PASSW|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|AUTH", re.IGNORECASE
    )
    secrets = sorted({v for k, v in environment.items() if pattern.search(k) and len(v) >= 6}, key=len, reverse=True)
    # Also passwords in addresses: scheme://user:password@host
    address = re.compile(r"(\w+://[^/\s:@]+):[^/\s@]+@")
    factory = logging.getLogRecordFactory()

    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        text = clean = record.getMessage()
        for secret in secrets:
            clean = clean.replace(secret, "[redacted]")
        clean = address.sub(r"\1:[redacted]@", clean)
        if clean != text:
            record.msg, record.args = clean, ()
        return record

    logging.setLogRecordFactory(make_record)

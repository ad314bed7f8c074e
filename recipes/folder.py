"""The folder of a run: what it may hold before the run starts."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from fairseq2.utils.structured import StandardValueConverter

from vembed_fs2.errors import ConfigError
from vembed_fs2.recipes.layers import load_yaml

log = logging.getLogger("vembed_fs2")

# The keys that may differ when a run is resumed.
_RESUMABLE: Final = ("regime", "common", "gang", "valid", "grad_cache", "dataset.num_workers", "dataset.prefetch")

ROWS: Final = "rows"
"""The folder, in a run's, of rows that were given as objects."""

# But not this of it: the order of the rows goes on with the first seed.
_FIXED: Final = ("common.seed",)


def prepare_output_dir(
    output_dir: Path,
    checkpoint_dir: Path | None,
    config: Any,
    world_size: int,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda values: values,
) -> None:
    """Refuse a folder that holds something else than this very run; delete what a killed run left half written.

    A run that has no checkpoint yet has nothing to lose, and may be started anew.

    :param complete: fills in the keys that a configuration leaves out, because the run of an older version lacks
        newer ones.
    :raises ConfigError: says what differs.
    """
    file = output_dir / "config.yaml"

    if not _is_run(output_dir):
        _check_empty(output_dir)
        return

    _check_checkpoint_dir(output_dir, checkpoint_dir)
    checkpoints = checkpoint_dir or output_dir / "checkpoints"

    steps = dict(_steps(checkpoints))
    if steps:
        differ = _find_differences(load_yaml(file), config, complete)
        if differ:
            text = f"it holds a run with other values in {', '.join(differ)}. Give a new folder, or delete this one."
            raise ConfigError(text, where=str(output_dir))
        _check_world_size(output_dir, steps[max(steps)], world_size)

    for half in checkpoints.glob("step_*.tmp"):
        shutil.rmtree(half, ignore_errors=True)


def check_new_or_run(output_dir: Path) -> bool:
    """Refuse a folder that holds something else than a run. *Returns:* whether it holds a run with checkpoints.

    :raises ConfigError: it holds files, but no run.
    """
    if not _is_run(output_dir):
        _check_empty(output_dir)
        return False
    return next(_steps(output_dir / "checkpoints"), None) is not None


def _is_run(folder: Path) -> bool:
    # fairseq2 begins its log before it writes the configuration: a configuration alone is a user's file.
    return (folder / "config.yaml").exists() and (folder / "logs").is_dir()


def link_checkpoints(output_dir: Path, checkpoint_dir: Path) -> None:
    """Let the folder of a run lead to its checkpoints elsewhere: to evaluate the run, or to resume it."""
    link, target = output_dir / "checkpoints", checkpoint_dir.resolve()
    if target in (link.resolve(), output_dir.resolve()):
        return

    try:
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)
    except OSError as ex:  # Some file systems have no links.
        log.warning("%s cannot lead to the checkpoints: %s. To use the model, name %s.", output_dir, ex, target)


def _check_checkpoint_dir(output_dir: Path, checkpoint_dir: Path | None) -> None:
    """Refuse another folder for checkpoints than that which the run began with."""
    before = output_dir / "checkpoints"
    if checkpoint_dir is None:
        if before.is_symlink() and not before.exists():
            text = f"its checkpoints are in {before.readlink()}, which does not exist. Give --checkpoint-dir."
            raise ConfigError(text, where=str(output_dir))
    elif before.exists() and checkpoint_dir.resolve() != before.resolve():
        text = f"its checkpoints are in {before.resolve()}. Give that as --checkpoint-dir, or a new OUTPUT_DIR."
        raise ConfigError(text, where=str(output_dir))


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written to. It need not exist.

    :raises ConfigError: says why.
    """
    # `Path.exists` is an error where a user may not look; here that is as if there were nothing.
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        what = "it" if nearest == folder.absolute() else str(nearest)
        raise ConfigError(f"{what} is a file. Give a folder.", where=str(folder))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{nearest} cannot be written to. Give another folder.", where=str(folder))


def _check_empty(folder: Path) -> None:
    if not folder.exists():
        return

    # The other ranks may be ahead of this one; and a run that failed at its start leaves these.
    if any(path.name not in ("logs", "cache", ROWS) for path in folder.iterdir()):
        raise ConfigError("it holds files, but no run. Give a new folder.", where=str(folder))


def _steps(checkpoints: Path) -> Iterator[tuple[int, Path]]:
    for folder in checkpoints.glob("step_*"):
        if folder.name[5:].isdigit():
            yield int(folder.name[5:]), folder


def _find_differences(
    before: Any, config: Any, complete: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> list[str]:
    now: Any = StandardValueConverter().unstructure(config)
    with suppress(ConfigError):  # An older configuration may not be valid any more: then compare it as it is.
        before, now = complete(before), complete(now)

    return list(_differing(before, now, ""))


def _differing(before: Any, now: Any, path: str) -> Iterator[str]:
    """The dotted keys whose values differ. A run of an older version lacks newer keys, but not those above them."""
    if before == now:
        return

    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        if path in _FIXED or not any(f"{path}.".startswith(f"{part}.") for part in _RESUMABLE):
            yield path
        return

    # Another component has other options: its name says enough.
    if "config" in now and before.get("name") != now.get("name"):
        yield f"{path}.name".lstrip(".")
        return

    for key in {**before, **now}:
        yield from _differing(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))


def _check_world_size(output_dir: Path, step: Path, world_size: int) -> None:
    written_by = len(list(step.glob("trainer/rank_*.pt")))
    if written_by == 0:
        text = (
            f"its checkpoints hold the model only (`regime.save_model_only`), so the run cannot go on. "
            f"Give a new folder, and {output_dir} as `model.path` to train the model further."
        )
        raise ConfigError(text, where=str(output_dir))

    if written_by != world_size:
        text = (
            f"its number of processes was {written_by}, and is now {world_size}. "
            f"Resume it with {written_by}, or give a new folder and the trained model as `model.path`."
        )
        raise ConfigError(text, where=str(output_dir))

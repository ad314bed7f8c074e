"""How a recipe is started: its configuration, its processes, its folder, and what is kept out of its logs."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vembed_fs2.cli import VEMBED
from vembed_fs2.errors import ConfigError
from vembed_fs2.recipes.arguments import add_recipe_arguments
from vembed_fs2.recipes.folder import check_writable, link_checkpoints, prepare_output_dir
from vembed_fs2.recipes.launch import (
    _report,
    _silence_disk_errors_in_threads,
    dump_config,
    find_system_error,
    load_config,
    run_recipe,
)
from vembed_fs2.recipes.presets import presets_of
from vembed_fs2.recipes.secrets import redact_logs, redactor
from vembed_fs2.recipes.train.recipe import create_recipe

TRAIN = "vembed_fs2.recipes.train"

VALID = ["model.name=x", "dataset.paths=[x.jsonl]"]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    return parser.parse_args(arguments)


def load(*arguments: str) -> Any:
    return load_config(TRAIN, create_recipe(), parse("out", *arguments))


def test_dumped_configuration_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = [*VALID, "optimizer.config.lr=1e-4", "lr_scheduler.name=cosine_annealing", "model.dtype=bfloat16"]

    assert run_recipe(TRAIN, parse("--dump-config", "--config", *config)) == 0

    file = tmp_path / "dumped.yaml"
    file.write_text(capsys.readouterr().out)
    read = load("--config-file", str(file))
    assert dump_config(read) == file.read_text()
    assert read == load("--config", *config)


def test_later_layers_win(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("dataset: {batch_size: 11, num_workers: 11, prefetch: 11}\n")
    second.write_text("dataset: {num_workers: 12, prefetch: 12}\n")
    files = ["--config-file", str(first), "--config-file", str(second)]

    config = load("--preset", "demo_text", *files, "--config", *VALID, "dataset.prefetch=13")

    dataset = config.dataset
    assert (dataset.batch_size, dataset.num_workers, dataset.prefetch, dataset.shuffle) == (11, 12, 13, True)
    preset = load("--preset", "demo_text", "--config", *VALID)
    assert preset != load("--config", *VALID)
    assert config.optimizer == preset.optimizer


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """With what the first line of each says."""
    assert run_recipe(TRAIN, parse("--preset", "list")) == 0

    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed["demo_text"] == "Fine-tunes a text model on pairs, one epoch."
    assert listed.keys() == presets_of(TRAIN).keys()


def test_the_nearest_preset_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'text_retreival' is not a preset\. Did you mean 'text_retrieval'\?"):
        load("--preset", "text_retreival")
    with pytest.raises(ConfigError, match=r"'xyz' is not a preset\. Presets: composed_model, "):
        load("--preset", "xyz")


def test_command_line_mistakes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(TRAIN, parse("--nproc-per-node", "0", "--config", "a=1", "out")) == 2

    error = capsys.readouterr().err
    assert "OUTPUT_DIR is required; give it before --config." in error
    assert "--nproc-per-node must be at least 1, but is 0." in error


def test_a_stack_trace_is_shown_when_it_is_asked_for() -> None:
    command = ["train", "--dump-config", "--preset", "nosuch"]

    assert VEMBED.main(command, "vembed") == 2
    with pytest.raises(ConfigError, match="'nosuch' is not a preset"):
        VEMBED.main([*command, "--traceback"], "vembed")


def test_what_the_system_refuses_is_said_without_a_stack_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.joinpath("file").write_text("")

    assert VEMBED.main(["demo", "images", str(tmp_path / "file" / "out")], "vembed") == 1

    assert capsys.readouterr().err.startswith("error: [Errno 20] Not a directory: ")


def test_a_full_disk_is_found_behind_other_errors() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    try:
        try:
            raise full
        finally:
            raise RuntimeError("unexpected pos 3 vs 2")
    except RuntimeError as ex:
        caught = ex

    assert find_system_error(caught) is full
    assert find_system_error(ValueError()) is None
    assert find_system_error(FileNotFoundError(errno.ENOENT, "a bug, as like as not")) is None


def test_a_full_disk_in_a_thread_is_left_to_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = []
    monkeypatch.setattr(threading, "excepthook", lambda args: printed.append(args.exc_value))
    _silence_disk_errors_in_threads()
    bug = ValueError("a bug")

    def fail(error: Exception) -> None:
        raise error

    for error in (OSError(errno.ENOSPC, "No space left on device"), bug):
        thread = threading.Thread(target=fail, args=[error])
        thread.start()
        thread.join()

    assert printed == [bug]


ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789",
    "HF_TOKEN": "hf_abcdef",
    "DB_PASS": "abc",
    "GIT_AUTHOR_NAME": "Ada Lovelace",
    "TOKENIZERS_PARALLELISM": "false",
    "PWD": "/home/ada",
    "http_proxy": "http://ada:p@ss/w0rd:x@proxy:80",
    "GIT_REMOTE": "https://ghp_secret@github.com/x",
}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("key 0123456789!", "key [redacted]!"),
        ("HF_TOKEN=hf_abcdef, DB_PASS=abc, x=abc", "HF_TOKEN=[redacted], DB_PASS=[redacted], x=abc"),
        ("by Ada Lovelace in /home/ada: false", "by Ada Lovelace in /home/ada: false"),
        ("http_proxy=http://ada:p@ss/w0rd:x@proxy:80, A=1", "http_proxy=http://[redacted]@proxy:80, A=1"),
        ("password p@ss/w0rd:x", "password [redacted]"),
        ("GIT_REMOTE=https://ghp_secret@github.com/x", "GIT_REMOTE=https://[redacted]@github.com/x"),
        ("see https://bob:hunter2@example.org/a@b", "see https://[redacted]@example.org/a@b"),
        ("mail ada@example.org, see https://example.org/@ada", "mail ada@example.org, see https://example.org/@ada"),
    ],
)
def test_secrets_are_masked(text: str, clean: str) -> None:
    assert redactor(ENVIRONMENT)(text) == clean


def test_secrets_are_masked_in_logs(caplog: pytest.LogCaptureFixture) -> None:
    factory = logging.getLogRecordFactory()
    redact_logs(ENVIRONMENT)
    try:
        try:
            raise ValueError("no: hf_abcdef")
        except ValueError:
            logging.getLogger("x").exception("sent %s to %s", "hf_abcdef", "them")
    finally:
        logging.setLogRecordFactory(factory)

    assert "hf_abcdef" not in caplog.text
    assert "sent [redacted] to them" in caplog.text
    assert "ValueError: no: [redacted]" in caplog.text


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run of two processes."""
    folder = tmp_path / "run"
    folder.joinpath("logs").mkdir(parents=True)
    folder.joinpath("config.yaml").write_text(dump_config(load("--config", *VALID)))
    for step, rank in ((2, 0), (2, 1), (10, 0), (10, 1)):
        folder.joinpath(f"checkpoints/step_{step}/trainer").mkdir(parents=True, exist_ok=True)
        folder.joinpath(f"checkpoints/step_{step}/trainer/rank_{rank:02}.pt").touch()
    folder.joinpath("checkpoints/step_12.tmp/model").mkdir(parents=True)
    return folder


def test_a_run_is_resumed_without_what_was_half_written(run_dir: Path) -> None:
    may_differ = ["regime.num_steps=99", "dataset.num_workers=0", "dataset.prefetch=9"]
    prepare_output_dir(run_dir, None, load("--config", *VALID, *may_differ), 2)

    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_10", "step_2"]


def test_a_run_is_not_resumed_on_another_number_of_processes(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"its number of processes was 2, and is now 4\. Resume it with 2"):
        prepare_output_dir(run_dir, None, load("--config", *VALID), 4)


def test_a_run_that_saved_the_model_only_is_not_started_anew(run_dir: Path) -> None:
    """It would train from the first step, and write over its checkpoints."""
    for file in run_dir.glob("checkpoints/step_10/trainer/*.pt"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"hold the model only .* as `model.path` to train the model further"):
        prepare_output_dir(run_dir, None, load("--config", *VALID), 2)
    assert run_dir.joinpath("checkpoints/step_10").is_dir()


def test_another_run_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"other values in dataset\.batch_size, optimizer\.config\.lr\."):
        prepare_output_dir(run_dir, None, load("--config", *VALID, "dataset.batch_size=3", "optimizer.config.lr=1"), 2)
    with pytest.raises(ConfigError, match=r"other values in common\.seed\."):
        prepare_output_dir(run_dir, None, load("--config", *VALID, "common.seed=3", "common.debug=true"), 2)


def test_a_run_without_a_checkpoint_is_started_anew(run_dir: Path) -> None:
    for step in (2, 10):
        run_dir.joinpath(f"checkpoints/step_{step}").rename(run_dir / f"checkpoints/step_{step}.tmp")

    prepare_output_dir(run_dir, None, load("--config", *VALID, "dataset.batch_size=3"), 1)


def test_a_run_keeps_its_folder_of_checkpoints(run_dir: Path, tmp_path: Path) -> None:
    def prepare(checkpoint_dir: Path | None) -> None:
        prepare_output_dir(run_dir, checkpoint_dir, load("--config", *VALID), 2)

    here, elsewhere = run_dir / "checkpoints", tmp_path / "elsewhere"
    prepare(here)
    with pytest.raises(ConfigError, match=f"its checkpoints are in {here}. Give that as --checkpoint-dir"):
        prepare(elsewhere)
    here.rename(elsewhere)
    link_checkpoints(run_dir, elsewhere)
    for given in (elsewhere, here, None):
        prepare(given)
    with pytest.raises(ConfigError, match=f"its checkpoints are in {elsewhere}"):
        prepare(tmp_path / "third")

    moved = elsewhere.rename(tmp_path / "moved")

    with pytest.raises(ConfigError, match=f"its checkpoints are in {elsewhere}, which does not exist"):
        prepare(None)
    prepare(moved)
    link_checkpoints(run_dir, moved)
    assert here.resolve() == moved


def test_a_file_system_without_links_stops_no_run(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    run_dir.joinpath("checkpoints").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(Path, "symlink_to", refuse)

    link_checkpoints(run_dir, tmp_path / "elsewhere")

    assert f"To use the model, name {tmp_path}/elsewhere." in caplog.text


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    tmp_path.joinpath("config.yaml").write_text("mine: 1\n")

    with pytest.raises(ConfigError, match="it holds files, but no run"):
        prepare_output_dir(tmp_path, None, load("--config", *VALID), 1)
    for name in ("config.yaml", "config.yaml/run"):
        with pytest.raises(ConfigError, match=r"(it|config\.yaml) is a file"):
            check_writable(tmp_path / name)
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize("option", [[], ["--checkpoint-dir"]])
def test_a_folder_that_cannot_be_written_to_is_an_error_before_anything_is_read(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for function in ("vembed_fs2.recipes.launch.redact_logs", "fairseq2.logging.configure_logging"):
        monkeypatch.setattr(function, lambda *args, **options: None)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    # Not by its mode: nothing is forbidden to root.
    monkeypatch.setattr(os, "access", lambda path, mode: path != read_only)
    folders = [str(tmp_path / "run")] if option else []

    assert run_recipe(TRAIN, parse(*folders, *option, str(read_only / "run"), "--config", *VALID)) == 2

    error = f"error: {read_only}/run is not valid:\n  - {read_only} cannot be written to. Give another folder.\n"
    assert capsys.readouterr().err == error


def test_only_who_has_a_full_disk_is_told_that_checkpoints_are_intact(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report(OSError(errno.ENOSPC, "No space left on device"), 1) == 1
    assert _report(OSError(errno.EACCES, "Permission denied", "run"), 1) == 1

    full, denied = capsys.readouterr().err.splitlines()
    assert full.endswith(
        "No space left on device. Checkpoints that were complete are intact; run the same command again to resume."
    )
    assert denied == "error: [Errno 13] Permission denied: 'run'."

"""All is logged to the file of the run, and the screen gets what a user can act on."""

from __future__ import annotations

import argparse
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from vembed_fs2.console import Screen
from vembed_fs2.recipes.arguments import add_recipe_arguments
from vembed_fs2.recipes.logs import keep_log, open_screen

OURS = ("fairseq2", "vembed_fs2", "plugin")

FAIRSEQ2 = logging.getLogger("fairseq2")


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    return parser.parse_args(["out", *arguments])


@pytest.fixture(autouse=True)
def _first_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    before = FAIRSEQ2.handlers[:]
    yield
    FAIRSEQ2.handlers = before


def open_file(file: Path) -> None:
    """As fairseq2 does when a run has its folder."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    FAIRSEQ2.addHandler(handler)


def log_everything(what: str) -> None:
    for name in OURS:
        logging.getLogger(name).info("%s %s", what, name)
    for name in (*OURS, "transformers.models", "torch.nn"):
        logging.getLogger(name).warning("%s %s", what, name)
    logging.getLogger("fairseq2").warning("Based on the environment setup, training will be run on CPU. %s", what)
    warnings.warn(f"{what} python", stacklevel=1)


def test_the_file_has_all_and_the_screen_what_is_of_use(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    file, shown = tmp_path / "log", io.StringIO()

    with keep_log(Screen(file=shown), parse()):
        log_everything("early")
        open_file(file)
        log_everything("late")
    assert "".join(capfd.readouterr()) == ""
    logging.getLogger("fairseq2").warning("after")

    of_use = [f"warning: {what} {name}\n" for what in ("early", "late") for name in OURS]
    assert shown.getvalue() == "".join(of_use)
    kept = file.read_text().splitlines()
    for what in ("early", "late"):
        for name in (*OURS, "transformers.models", "torch.nn"):
            assert kept.count(f"WARNING {name} {what} {name}") == 1, kept
        assert [kept.count(f"INFO {name} {what} {name}") for name in OURS] == [1, 1, 1]
        assert sum(f"UserWarning: {what} python" in line for line in kept) == 1
        assert sum(line.endswith(f"run on CPU. {what}") for line in kept) == 1
    assert not any("after" in line for line in kept)
    assert (root.handlers, root.level) == (handlers, level)


def test_runs_of_one_process_have_their_own_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with keep_log(Screen(shown=False), parse()):
            open_file(tmp_path / name)
            logging.getLogger("vembed_fs2").info(name)

    assert tmp_path.joinpath("first").read_text() == "INFO vembed_fs2 first\n"
    assert tmp_path.joinpath("second").read_text() == "INFO vembed_fs2 second\n"


def test_an_error_is_shown_with_its_stack_trace(tmp_path: Path) -> None:
    shown = io.StringIO()
    with keep_log(Screen(shown=False, file=shown), parse("--quiet")):
        try:
            raise KeyError("x")
        except KeyError:
            logging.getLogger("fairseq2").exception("Failed.")

    assert shown.getvalue().startswith("error: Failed.\nTraceback ")


def test_only_the_first_process_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_screen(parse()).shown
    assert not open_screen(parse("--quiet")).shown
    assert not open_screen(parse("--verbose")).shown
    monkeypatch.setenv("RANK", "1")
    assert not open_screen(parse()).shown
    shown = io.StringIO()
    with keep_log(Screen(shown=False, file=shown), parse()):
        log_everything("other")
    assert shown.getvalue() == ""

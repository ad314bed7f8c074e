"""What commands show while they work."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from vembed_fs2 import console
from vembed_fs2.console import Screen, format_rate, format_time, short_path


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "monotonic", clock)
    return clock


def test_a_bar_outside_a_terminal_is_a_line_now_and_then(clock: Clock) -> None:
    file = io.StringIO()
    bar = Screen(file=file).bar("Training", 1000, unit="steps", done=100)
    bar.rate = 0.0
    bar.facts = {"loss": "0.5", "": "310 rows/s"}

    bar.update(101)
    assert file.getvalue() == ""
    clock.now += 30
    bar.update(110)
    clock.now += 29
    bar.update(111)

    assert file.getvalue() == "Training: 110/1,000 steps, loss 0.5, 310 rows/s, 44:30 left\n"


def test_a_day_has_few_lines(clock: Clock) -> None:
    file = io.StringIO()
    bar = Screen(file=file).bar("Training", None, unit="steps")
    for _ in range(24 * 3600):
        clock.now += 1
        bar.advance()

    assert 50 < file.getvalue().count("\n") < 150
    assert file.getvalue().endswith(" steps, 1 steps/s\n")


def test_a_pause_does_not_count(clock: Clock) -> None:
    bar = Screen(file=io.StringIO()).bar("Training", 20, unit="steps")
    clock.now += 10
    bar.update(10)
    bar.pause()
    clock.now += 1000
    assert bar.describe() == "10/20 steps, 1 steps/s, 0:10 left"
    bar.resume()
    clock.now += 10
    bar.update(11)
    assert bar.describe() == "11/20 steps, 0.55 steps/s, 0:16 left"


def test_a_line_stays_only_if_all_went_well(clock: Clock) -> None:
    file = io.StringIO()
    screen = Screen(file=file)
    with screen.bar("Encoding", 4, unit="rows", keep=True) as bar:
        clock.now += 2
        bar.advance(4)
    with pytest.raises(KeyError), screen.bar("Encoding", 4, unit="rows", keep=True):
        raise KeyError

    assert file.getvalue() == "Encoding: 4/4 rows, 2 rows/s\n"


def test_warnings_are_shown_whatever_is_shown_else() -> None:
    file = io.StringIO()
    screen = Screen(shown=False, file=file)
    screen.line("a line")
    screen.facts("Title", {"a": "b"})
    with screen.bar("Encoding", 4, unit="rows", keep=True) as bar:
        bar.advance(4)
    screen.warn("careful")

    assert file.getvalue() == "warning: careful\n"


def test_facts_are_aligned() -> None:
    file = io.StringIO()
    Screen(file=file).facts("Title", {"a": "1", "bcd": "[2]"})

    assert file.getvalue() == "Title\n  a    1\n  bcd  [2]\n"


def test_a_terminal_without_control_characters_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("FAIRSEQ2_NO_PROGRESS", raising=False)
    for name, value in (("TERM", "dumb"), ("FAIRSEQ2_NO_PROGRESS", "1")):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv(name, value)
        assert not Screen(file=Terminal()).is_live
        monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "xterm")
    assert Screen(file=Terminal()).is_live
    assert not Screen(file=Terminal(), live=False).is_live
    assert not Screen(file=io.StringIO()).is_live


def test_times_and_rates() -> None:
    assert [format_time(s) for s in (0, 59.6, 3599, 86399)] == ["0:00", "1:00", "59:59", "23:59:59"]
    assert [format_rate(r) for r in (0.123, 9.96, 10, 1234.5)] == ["0.12", "10", "10", "1,234"]


def test_paths_are_as_short_as_one_types_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert short_path(tmp_path / "a" / "b") == os.path.join("a", "b")
    assert short_path("a") == "a"
    assert short_path(tmp_path.parent) == str(tmp_path.parent)

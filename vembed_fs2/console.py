"""What a command shows while it works: facts, lines, and a bar. Made here, and nowhere else.

It goes to the standard error, so that what a command prints (a table, a
configuration) can be piped. In a terminal the bar moves; elsewhere it is a plain
line now and then, without control characters. Colours are left out if
``NO_COLOR`` is set, and the bar does not move if ``FAIRSEQ2_NO_PROGRESS`` is.
Light: rich is imported when something is shown in a terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TextIO

from typing_extensions import Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_FIRST_LINE: Final = 30.0
"""Seconds until a bar that does not move has its first line."""

_LINE_EVERY: Final = 0.05
"""Later it has a line each time that this much of the time so far has passed: a day has about 150."""


class Screen:
    """Where a command shows what it does.

    :param shown: if ``False``, only warnings and errors are shown.
    :param live: whether bars move; ``None`` finds it out from the stream.
    :param file: the stream; the standard error by default, as it is at each line.
    """

    def __init__(self, *, shown: bool = True, live: bool | None = None, file: TextIO | None = None) -> None:
        self.shown = shown
        self._live = live
        self._file = file
        self._made: Console | None = None
        self._progress: Progress | None = None

    @property
    def file(self) -> TextIO:
        return self._file or sys.stderr

    @property
    def is_live(self) -> bool:
        """Whether bars move."""
        if not self.shown or self._live is False:
            return False
        if self._live is None and os.environ.get("FAIRSEQ2_NO_PROGRESS"):
            return False
        return self._progress is not None or self._console() is not None

    def line(self, text: str, *, style: str = "") -> None:
        """Show a line, or several, if anything is shown."""
        if self.shown:
            self._write(text, style)

    def facts(self, title: str, facts: Mapping[str, str]) -> None:
        """Show a title, and facts by their names."""
        if not self.shown:
            return

        width = max(map(len, facts), default=0)
        self.line(title, style="bold")
        for name, fact in facts.items():
            self.line(f"  {name:<{width}}  {fact}")

    def warn(self, text: str) -> None:
        """Show a warning, whatever is shown else."""
        self._write(f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """Show an error, whatever is shown else."""
        self._write(f"error: {text}", "red")

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Say what is being done for as long as it takes, where lines can be taken back."""
        if not self.is_live or self._progress is not None:
            yield
            return

        console = self._console()
        assert console is not None
        from rich.text import Text

        with console.status(Text(text)):
            console.show_cursor(True)  # A process that is killed could not bring it back.
            yield

    def bar(self, name: str, total: int | None, *, unit: str, done: int = 0, keep: bool = False) -> Bar:
        """Start a bar.

        :param total: how many units there are; ``None`` if it is not known.
        :param unit: what is counted, for example "rows".
        :param done: how many are done already.
        :param keep: whether a line stays when the bar is closed after all has gone well.
        """
        return Bar(self, name, total, unit, done, keep)

    def close(self) -> None:
        """End all bars, so that the next line of anybody stands alone."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, text: str, style: str) -> None:
        console = self._console()
        if console is None:
            # In one call, because other threads write as well.
            self.file.write(f"{text}\n")
            self.file.flush()
            return

        from rich.text import Text

        console.print(Text(text, style=style), soft_wrap=True)

    def _console(self) -> Console | None:
        """The terminal; ``None`` if the stream is something else, or knows no control characters."""
        if self._progress is not None:
            return self._progress.console
        if not (self._live or is_terminal(self.file) or _is_notebook()):
            return None

        if self._made is None or self._made.file is not self.file:
            from rich.console import Console

            color_system: Any = None if os.environ.get("NO_COLOR") else "auto"
            self._made = Console(file=self.file, highlight=False, color_system=color_system, force_terminal=self._live)

        return self._made

    def _bars(self) -> Progress:
        """Return what draws the bars, and start it with the first one."""
        if self._progress is not None:
            return self._progress

        from rich.progress import BarColumn, Progress, TextColumn

        console = self._console()
        assert console is not None
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._progress.start()
        console.show_cursor(True)

        return self._progress


class Bar:
    """How far something is, with its rate and the time that is left."""

    def __init__(self, screen: Screen, name: str, total: int | None, unit: str, done: int, keep: bool) -> None:
        self._screen = screen
        self._keep = keep
        self._name = name
        self._total = total
        self._unit = unit
        self._first = self.done = done
        self.facts: dict[str, str] = {}
        """What is shown beside the bar, by name; a name that is empty is left out."""

        self.rate: float | None = None
        """Units per second, if another rate is to be shown than what is measured here; 0 shows none."""

        self._started = self._shown_at = monotonic()
        self._paused_at: float | None = None
        self._task: Any = None
        if screen.is_live:
            self._task = screen._bars().add_task(name, total=total, completed=done, text="")

    def advance(self, count: int = 1) -> None:
        """Count units that are done."""
        self.update(self.done + count)

    def update(self, done: int) -> None:
        """Say how many units are done, and show it if it is time."""
        self.done = done
        now = monotonic()
        if self._task is not None:
            bars = self._screen._progress
            if bars is not None:
                bars.update(self._task, completed=done, text=self.describe())
        elif now - self._shown_at >= max(_FIRST_LINE, _LINE_EVERY * (now - self._started)):
            self._shown_at = now
            self._screen.line(f"{self._name}: {self.describe()}")

    def pause(self) -> None:
        """Leave the time until :meth:`resume` out of the estimate of what is left, for example a validation's."""
        self._paused_at = monotonic()

    def resume(self) -> None:
        """Count the time again."""
        if self._paused_at is not None:
            self._started += monotonic() - self._paused_at
            self._paused_at = None

    def describe(self) -> str:
        """How far it is, what goes with it, and the time left, as one line."""
        count = f"{self.done:,}" if self._total is None else f"{self.done:,}/{self._total:,}"
        parts = [f"{count} {self._unit}", *(f"{name} {fact}".strip() for name, fact in self.facts.items())]

        seconds = (self._paused_at or monotonic()) - self._started
        finished = self.done - self._first
        if finished > 0 and seconds > 0:
            if self.rate is None:
                parts.append(f"{format_rate(finished / seconds)} {self._unit}/s")
            if self._total is not None and self.done < self._total:
                parts.append(f"{format_time((self._total - self.done) * seconds / finished)} left")

        return ", ".join(parts)

    def close(self) -> None:
        """Take the bar away. The last one of a screen ends the drawing."""
        bars = self._screen._progress
        if self._task is None or bars is None:
            return

        bars.remove_task(self._task)
        self._task = None
        if not bars.tasks:
            self._screen.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
        if self._keep and exc[0] is None:
            self._screen.line(f"{self._name}: {self.describe()}")


def is_terminal(file: TextIO) -> bool:
    """Whether a stream shows what it gets at once, and understands how to take it back."""
    return file.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def _is_notebook() -> bool:
    """Whether this is a notebook that has what rich draws with there."""
    shell = sys.modules.get("IPython")
    if shell is None or type(shell.get_ipython()).__name__ != "ZMQInteractiveShell":
        return False
    return find_spec("ipywidgets") is not None


def format_time(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(rate: float) -> str:
    """Return a rate with as many digits as it has meaning."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def short_path(path: str | Path) -> str:
    """Return a path as one would type it here: relative to the working folder, if it is in it."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)

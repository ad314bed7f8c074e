"""A progress bar for what takes long."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from typing_extensions import Self


class Progress:
    """Counts inputs on the terminal, or does nothing.

    :param total: the number of inputs; ``None`` if it is not known.
    """

    def __init__(self, total: int | None, enabled: bool) -> None:
        self._bar: Any = None

        if enabled:
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress()
            self._task = self._bar.add_task("encode", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Count ``count`` inputs more."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

"""The log of a run: all of it in a file, and on the screen what a user has to know."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from typing_extensions import override

from vembed_fs2.console import Screen
from vembed_fs2.fairseq2_seams import without_console_log

_LIBRARIES: Final = ("torch", "transformers")
"""The loggers of libraries whose warnings a user of this package cannot act on. They print them themselves."""

_KNOWN: Final = (
    "Based on the environment setup, training will be run on CPU.",
    "As of this release, only FSDP supports static mixed precision training.",
)
"""How warnings of fairseq2 begin that say what the screen says: the device, and the precision."""


def open_screen(args: argparse.Namespace) -> Screen:
    """Return the screen of a process, as the command line asks for it. Only the first process of a gang shows."""
    is_shown = not (args.quiet or args.verbose) and os.environ.get("RANK", "0") == "0"
    return Screen(shown=is_shown, live=False if args.no_rich else None)


@contextmanager
def keep_log(screen: Screen, args: argparse.Namespace) -> Iterator[None]:
    """Log everything to the file that fairseq2 opens in the run's folder, and to the screen what belongs there.

    fairseq2's file has its own lines only. Here it gets those of all loggers,
    Python's warnings, what native libraries print, and what was logged before the
    file was there. At the end, logging is as it was.
    """
    from fairseq2.logging import configure_logging

    root, loggers = logging.getLogger(), [logging.getLogger("fairseq2"), logging.getLogger("vembed_fs2")]
    libraries = [logging.getLogger(name) for name in _LIBRARIES]

    level, handlers = root.level, [logger.handlers[:] for logger in (root, *loggers)]
    printers = [(logger, logger.handlers, logger.propagate) for logger in libraries]
    for logger in libraries:
        logger.handlers, logger.propagate = [], True

    if args.verbose:
        root.handlers = []  # Not closed, as fairseq2 would.
        configure_logging(no_rich=args.no_rich)
    else:
        root.handlers = [_ScreenHandler(screen)] if os.environ.get("RANK", "0") == "0" else [logging.NullHandler()]
        root.setLevel(logging.INFO)

    file = _FileHandler(old=handlers[1])
    root.addHandler(file)
    try:
        with warnings.catch_warnings(), without_console_log():
            logging.captureWarnings(True)
            yield
    finally:
        logging.captureWarnings(False)
        file.restore_stdout()
        root.setLevel(level)
        for logger, kept in zip((root, *loggers), handlers):
            for handler in logger.handlers:
                if handler not in kept:
                    handler.close()
            logger.handlers = kept
        for logger, kept, propagate in printers:
            logger.handlers, logger.propagate = kept, propagate


class _ScreenHandler(logging.Handler):
    """Shows warnings and errors."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.WARNING)
        self._screen = screen

    @override
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno < logging.ERROR:
            if not record.name.startswith(("py.warnings", *_LIBRARIES)) and not text.startswith(_KNOWN):
                self._screen.warn(text)
            return

        self._screen.close()
        self._screen.error(self.format(record))


class _FileHandler(logging.Handler):
    """Passes records on to the file that fairseq2 gives its own logger, as soon as that has one.

    :param old: the handlers that fairseq2's logger had before, such as another run's file.
    """

    def __init__(self, old: Sequence[logging.Handler]) -> None:
        super().__init__()
        self._old = old
        self._early: list[logging.LogRecord] | None = []
        self._terminal: int | None = None

    @override
    def emit(self, record: logging.LogRecord) -> None:
        handlers = [h for h in logging.getLogger("fairseq2").handlers if h not in self._old]
        file = next((h for h in handlers if isinstance(h, logging.FileHandler)), None)
        if file is None:
            if self._early is not None:
                self._early.append(record)
            return

        if self._early is not None:
            early, self._early = self._early, None
            self._redirect_stdout(file)
            for earlier in early:
                file.handle(earlier)

        if not _passes(record.name, file):
            file.handle(record)

    def _redirect_stdout(self, file: logging.FileHandler) -> None:
        """Let native libraries print to the file: gloo says of each group that it is connected. Python prints on."""
        stdout = sys.__stdout__
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or stdout is None or sys.stdout is not stdout:
            return

        stdout.flush()
        self._terminal = os.dup(1)
        assert file.stream is not None  # It has been written to.
        os.dup2(file.stream.fileno(), 1)
        sys.stdout = os.fdopen(os.dup(self._terminal), "w", buffering=1, errors=stdout.errors)

    def restore_stdout(self) -> None:
        if self._terminal is None:
            return

        sys.stdout.close()
        sys.stdout = sys.__stdout__
        os.dup2(self._terminal, 1)
        os.close(self._terminal)
        self._terminal = None


def _passes(name: str, handler: logging.Handler) -> bool:
    """Whether a record has been to the handler on its way from its own logger to the root."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger.parent is not None:
        if handler in logger.handlers:
            return True
        logger = logger.parent if logger.propagate else None
    return False

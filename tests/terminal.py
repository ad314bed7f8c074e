"""A terminal for tests: runs a function in one, and shows what a user would see in the end."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.forks import TIMEOUT, fork

_CODES = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


def run_in_terminal(
    function: Callable[..., object], *args: Any, env: Mapping[str, str], columns: int = 160
) -> tuple[int, str]:
    """Call ``function(*args)`` in a process with a terminal. *Returns:* its status, and all that it has written."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = fork(function, *args, env=env, log=Path(os.ttyname(slave)))

    written = b""
    deadline = time.monotonic() + TIMEOUT
    try:
        while True:
            is_over = process.exitcode is not None
            while select.select([master], [], [], 0.0 if is_over else 0.1)[0]:
                written += os.read(master, 65536)
            if is_over:
                assert process.exitcode is not None
                return process.exitcode, written.decode()
            assert time.monotonic() < deadline, f"took too long:\n{written.decode()}"
    finally:
        process.kill()
        process.join()
        os.close(slave)
        os.close(master)


def render(written: str) -> list[str]:
    """Return the lines that a terminal shows after all of this was written, without colours."""
    lines, row, column = [""], 0, 0
    for match in _CODES.finditer(written):
        text, (count, code) = match[0], (match[1], match[2])
        if text == "\r":
            column = 0
        elif text == "\n":
            row, column = row + 1, column
        elif code == "A":
            row -= int(count or 1)
        elif code == "K":
            lines[row] = ""
        elif code is None:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + text + line[column + len(text) :]
            column += len(text)
        else:
            assert code in "mhl", f"The terminal does not know {text!r}."
        lines += [""] * (row + 1 - len(lines))

    return [line.rstrip() for line in lines if line.strip()]

"""Keeps secrets out of logs. fairseq2 logs the whole environment when a recipe starts."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

_MASK: Final = "[redacted]"

_SECRET_NAME: Final = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASS(?:W|_?PHRASE|_|$)|PWD$|KEY(?!BOARD)|CREDENTIAL|AUTH(?!OR)|COOKIE|DSN$|CONNECTION_?STRING",
    re.IGNORECASE,
)

# Shorter values occur in other words; they are masked next to their names only.
_SHORTEST: Final = 6

# scheme://user:password@host; a token may stand alone in place of both.
_ADDRESS: Final = re.compile(r"(\w+://)[^\s/?#,'\"]+@")


def redactor(environment: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that masks the secrets of ``environment``, and passwords in addresses, in a text."""
    secrets, pairs = set(), set()
    for name, value in environment.items():
        if name not in ("PWD", "OLDPWD") and value and _SECRET_NAME.search(name):
            pairs.add((f"{name}={value}", f"{name}={_MASK}"))
            secrets.add(value)

        # A password may hold the very characters that end an address elsewhere.
        if match := re.match(r"(\w+://)(.+)@", value):
            pairs.add((f"{name}={value}", f"{name}={match[1]}{_MASK}@{value[match.end() :]}"))
            secrets.update(part for part in [match[2], *match[2].split(":", 1)[1:]] if part)

    masks = sorted(pairs, key=lambda p: -len(p[0]))
    masks += [(s, _MASK) for s in sorted(secrets, key=len, reverse=True) if len(s) >= _SHORTEST]

    def redact(text: str) -> str:
        for secret, mask in masks:
            text = text.replace(secret, mask)
        return _ADDRESS.sub(rf"\1{_MASK}@", text)

    return redact


def redact_logs(environment: Mapping[str, str]) -> None:
    """Mask secrets in everything that is logged from now on, stack traces included."""
    redact = redactor(environment)
    factory = logging.getLogRecordFactory()
    formatter = logging.Formatter()

    def make_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = factory(*args, **kwargs)
        text = record.getMessage()
        clean = redact(text)
        if clean != text:
            record.msg, record.args = clean, ()

        if record.exc_info and record.exc_info[0] is not None:
            trace = formatter.formatException(record.exc_info)
            if (clean := redact(trace)) != trace:
                record.exc_info, record.exc_text = None, clean

        return record

    logging.setLogRecordFactory(make_record)

"""JSON in which no object has a key twice: Python's own reader takes the last value without a word."""

from __future__ import annotations

import json
from typing import Any, Final


class RepeatedKeyError(ValueError):
    """An object has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} stands twice in one object")


def parse_json(text: str) -> Any:
    """Parse JSON.

    :raises RepeatedKeyError: an object has a key twice.
    :raises ValueError: ``text`` is not JSON.
    """
    return _DECODER.decode(text)


def find_repeated_key(text: str) -> tuple[int, RepeatedKeyError] | None:
    """Return the line (from 1) of the first element of a list that has a key twice, and the error, if there is one."""
    position = text.find("[") + 1
    while True:
        while text[position : position + 1] in (" ", "\t", "\n", "\r", ","):
            position += 1
        try:
            _, position = _DECODER.raw_decode(text, position)
        except RepeatedKeyError as ex:
            return text.count("\n", 0, position) + 1, ex
        except ValueError:
            return None


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return values


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_to_object)

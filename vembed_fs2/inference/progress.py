"""A progress bar for what takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Final, Protocol

from vembed_fs2.console import Screen
from vembed_fs2.data.example import Role
from vembed_fs2.embedding.model import Embeddings
from vembed_fs2.inference.encoder import Encoded

_NAMES: Final = {"query": "Queries", "document": "Documents", None: "Encoding"}

Finish = Callable[[Embeddings], Embeddings]


class Encode(Protocol):
    """Encodes; ``finish`` is applied to the embeddings of each forward pass."""

    def __call__(self, *, finish: Finish) -> Iterator[Encoded]: ...


def track(
    encode: Encode, finish: Finish, *, total: int | None, show: bool | Screen, role: Role | None
) -> Iterator[Encoded]:
    """Pass results on, and show how many rows are encoded, their rate, and the time left.

    :param total: the number of rows of all; ``None`` if it is not known.
    :param show: where; ``True`` is the standard error.
    """
    screen = show if isinstance(show, Screen) else Screen()
    own = nullcontext() if screen is show else screen

    with own, screen.bar(_NAMES[role], total, unit="rows", keep=True) as bar:

        def count(embeddings: Embeddings) -> Embeddings:
            bar.advance(embeddings.values.size(0))
            return finish(embeddings)

        yield from encode(finish=count)

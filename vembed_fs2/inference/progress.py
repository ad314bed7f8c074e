"""A progress bar for what takes long."""

from __future__ import annotations

from collections.abc import Iterator

from vembed_fs2.inference.encoder import Encoded


def track(encoded: Iterator[Encoded], total: int | None) -> Iterator[Encoded]:
    """Pass results on, and show how many rows they have.

    :param total: the number of rows of all; ``None`` if it is not known.
    """
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task("encode", total=total)
        for rows, embeddings in encoded:
            yield rows, embeddings
            progress.advance(task, len(rows))

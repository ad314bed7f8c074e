"""Which rows an objective can be trained on: what training and ``data check`` both go by."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

from vembed_fs2.data.example import Example


class SupportsNeeds(Protocol):
    """What an objective says of the rows that it takes."""

    @property
    def uses_labels(self) -> bool: ...

    @property
    def needs_scores(self) -> bool: ...

    @property
    def needs_negatives(self) -> bool: ...


@dataclass
class DataFacts:
    """What is known of a data set as a whole."""

    num_rows: int = 0

    num_of_one_side: int = 0
    """The number of rows with a label but without a positive."""

    num_scored: int = 0
    """The number of rows with scores."""

    num_with_negatives: int = 0
    """The number of rows with explicit negatives."""

    def add(self, example: Example) -> None:
        self.num_rows += 1
        self.num_of_one_side += example.positive is None
        self.num_scored += bool(example.scores)
        self.num_with_negatives += bool(example.negatives)


def missing_in_row(example: Example, loss: SupportsNeeds) -> str | None:
    """Say what a row lacks for an objective to learn from it; ``None`` if nothing."""
    if example.positive is None and example.label is None:
        return "the row has no positive to train on"
    if example.positive is None and not loss.uses_labels:
        return "the row has no positive to train on, and the objective does not learn from labels alone"
    if loss.needs_scores and not example.scores:
        return "the row has no `scores`, which the objective learns from"
    return None


def missing_in_data(facts: DataFacts, label_sizes: Collection[int], loss: SupportsNeeds) -> Iterator[str]:
    """Say what a data set lacks as a whole for an objective to learn from it.

    :param label_sizes: the number of rows of each label. Needed if all rows have a label only.
    """
    if loss.needs_negatives and facts.num_with_negatives == 0:
        yield "the objective compares the documents of each row, but no row has `negatives`"

    if facts.num_of_one_side == facts.num_rows and loss.uses_labels:
        if max(label_sizes, default=0) < 2:
            yield "no label is that of two rows, so no row has a positive"
        elif len(label_sizes) == 1 and facts.num_with_negatives == 0:
            yield "all rows have one label, so there is nothing to tell apart"

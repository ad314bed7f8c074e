"""A table of questions, answers and hard negatives, as a user brings it: the CSV files of the first guide."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

from vembed_fs2.demo.text import build_pairs, split_pairs
from vembed_fs2.errors import VembedError
from vembed_fs2.files import write_text

ANSWER_LENGTH: Final = 400
"""Answers are cut to so many characters: enough to say what they are about, and quick to train on."""

NUM_NEGATIVES: Final = 2
"""The hard negatives of a row."""


class TableFiles(NamedTuple):
    """The files of :func:`write_table`."""

    train: Path
    """Rows to train on."""

    valid: Path
    """Rows to measure with."""


def write_table(out: Path, *, num_train: int = 1000, num_valid: int = 200, seed: int = 0) -> TableFiles:
    """Write ``train.csv`` and ``valid.csv``, with the columns of :func:`build_table`.

    :raises VembedError: one of the files exists, or scikit-learn is not installed.
    :raises DataError: the installed documentation holds too few rows.
    """
    files = TableFiles(out / "train.csv", out / "valid.csv")
    for file in files:
        if file.exists():
            raise VembedError(f"'{file}' exists. Choose another folder.")

    if find_spec("sklearn") is None:
        raise VembedError('Hard negatives are found with scikit-learn: pip install "vembed_fs2[demo]"')

    train, valid = split_pairs(build_pairs(), num_held_out=num_valid, num_train=num_train, seed=seed)
    for file, pairs in zip(files, (train, valid), strict=True):
        write_text(file, _as_csv(build_table(pairs)))
    return files


def build_table(pairs: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Give each pair its hard negatives: the answers of other pairs that share most words with the query.

    Words are weighted by TF-IDF.

    :returns: rows of ``query``, ``positive``, ``negative_1`` and ``negative_2``.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    answers = [pair["positive"][:ANSWER_LENGTH] for pair in pairs]
    vectorizer = TfidfVectorizer(stop_words="english").fit(answers)
    search = NearestNeighbors(n_neighbors=NUM_NEGATIVES + 1).fit(vectorizer.transform(answers))
    nearest = search.kneighbors(vectorizer.transform([pair["query"] for pair in pairs]), return_distance=False)

    rows = []
    for i, pair in enumerate(pairs):
        others = [answers[j] for j in nearest[i] if j != i]
        negatives = {f"negative_{n + 1}": others[n] for n in range(NUM_NEGATIVES)}
        rows.append({"query": pair["query"], "positive": answers[i], **negatives})

    return rows


def _as_csv(rows: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

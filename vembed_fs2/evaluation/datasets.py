"""What to evaluate on: queries, documents, and which of them belong together."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vembed_fs2.data.example import Example, Item
from vembed_fs2.data.row import Layout, RowError, RowReader
from vembed_fs2.data.schema import content_id
from vembed_fs2.data.sources import RowSource
from vembed_fs2.errors import DataError
from vembed_fs2.evaluation.task import NOTHING_RELEVANT, RetrievalTask


def task_from_examples(examples: Sequence[Example]) -> RetrievalTask:
    """Make a task of rows as they are used for training.

    - The documents are the positives and the negatives; the same content (see
      :func:`~vembed_fs2.data.schema.content_id`) is one document.
    - Rows with the same query are one query; all their positives are relevant.
    - A row's label is its positive's label as well: all documents with the
      label of a query are relevant.
    - Where no row has a positive, the rows are searched among themselves: every
      other row with the same label is relevant (Stanford Online Products style).

    :raises DataError: there are no rows, a row has neither a positive nor a label, or nothing is relevant to any.
    """
    if not examples:
        raise DataError("There are no rows to evaluate on.")

    for example in examples:
        if example.positive is None and example.label is None:
            raise DataError(f"{example.source or 'A row'} has neither a positive nor a label to evaluate with.")

    if all(example.positive is None for example in examples):
        return _checked(_task_of_labels(examples))

    return _checked(_task_of_positives(examples))


def _checked(task: RetrievalTask) -> RetrievalTask:
    """Return ``task``, if there is something to measure: encoding for nothing may take hours."""
    own = range(len(task.relevant)) if task.exclude_self else [None] * len(task.relevant)
    if not any(len(documents) > (query in documents) for query, documents in zip(own, task.relevant)):
        raise DataError(NOTHING_RELEVANT)
    return task


class _Index:
    """Items with the same content are one."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._positions: dict[int, int] = {}

    def add(self, item: Item, source: str) -> int:
        position = self._positions.setdefault(content_id(item), len(self.items))
        if position == len(self.items):
            self.items.append(replace(item, source=source) if item.images else item)
        return position


def _task_of_positives(examples: Sequence[Example]) -> RetrievalTask:
    queries, corpus = _Index(), _Index()

    positives: dict[int, dict[int, float]] = defaultdict(dict)
    labels: dict[int, set[str]] = defaultdict(set)
    by_label: dict[str, dict[int, float]] = defaultdict(dict)
    for example in examples:
        query = queries.add(example.query, example.source)
        if example.label is not None:
            labels[query].add(example.label)

        if example.positive is not None:
            document = corpus.add(example.positive, example.source)
            positives[query][document] = 1.0
            if example.label is not None:
                by_label[example.label][document] = 1.0

        for negative in example.negatives:
            corpus.add(negative, example.source)

    relevant = [
        _union([by_label[label] for label in sorted(labels[query])], positives[query])
        for query in range(len(queries.items))
    ]
    return RetrievalTask(queries.items, corpus.items, relevant)


def _task_of_labels(examples: Sequence[Example]) -> RetrievalTask:
    items = _Index()
    labels: dict[int, set[str]] = defaultdict(set)
    by_label: dict[str, dict[int, float]] = defaultdict(dict)
    for example in examples:
        assert example.label is not None
        position = items.add(example.query, example.source)
        labels[position].add(example.label)
        by_label[example.label][position] = 1.0

    relevant = [_union([by_label[label] for label in sorted(labels[i])], {}) for i in range(len(items.items))]
    return RetrievalTask(items.items, items.items, relevant, exclude_self=True)


def _union(sets: Sequence[dict[int, float]], own: dict[int, float]) -> dict[int, float]:
    # One set is shared by all queries of a label: large classes would not fit otherwise.
    if len(sets) == 1 and own.keys() <= sets[0].keys():
        return sets[0]

    union = dict(own)
    for documents in sets:
        union |= documents
    return union


def task_from_folder(
    folder: str | os.PathLike[str], split: str = "test", *, image_root: str | os.PathLike[str] | None = None
) -> RetrievalTask:
    """Read a folder in the layout of BEIR: ``corpus``, ``queries`` and ``qrels/<split>.tsv`` or ``qrels.tsv``.

    :raises DataError: a file is missing, or see :func:`task_from_files`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")

    qrels = (folder / "qrels" / f"{split}.tsv", folder / "qrels.tsv", folder / "qrels" / f"{split}.txt")

    return task_from_files(
        _first_file([folder / f"queries{s}" for s in (".jsonl", ".parquet", ".tsv", ".csv")]),
        _first_file([folder / f"corpus{s}" for s in (".jsonl", ".parquet", ".tsv", ".csv")]),
        _first_file(qrels),
        image_root=image_root or folder,
    )


def _first_file(candidates: Sequence[Path]) -> Path:
    for file in candidates:
        if file.is_file():
            return file
    raise DataError(f"{candidates[0]} does not exist (nor {', '.join(str(f) for f in candidates[1:])}).")


def task_from_files(
    queries: str | os.PathLike[str],
    corpus: str | os.PathLike[str],
    qrels: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
) -> RetrievalTask:
    """Read a task from three files.

    Queries and documents are rows with ``_id`` (or ``id``), ``text``,
    optionally ``title`` (put before the text) and ``image`` (a path under
    ``image_root``). Judgements are the tab-separated ``query-id corpus-id
    score`` with a header, or TREC's four columns ``query 0 document grade``.
    Grades that are not greater than 0 mean "not relevant". Queries without
    any judgement belong to another split and are left out.

    :param image_root: the folder that images lie in; each file's own folder by default.

    :raises DataError: a row is broken, or a judgement names an unknown query or
        document; the message names file and line. Or no document is relevant.
    """
    query_ids, query_items = _read_items(Path(queries), image_root)

    document_ids, documents = _read_items(Path(corpus), image_root)
    judged: dict[int, dict[int, float]] = defaultdict(dict)
    seen: set[tuple[int, int]] = set()
    for where, query_id, document_id, grade in _read_qrels(Path(qrels)):
        query, document = query_ids.get(query_id), document_ids.get(document_id)
        if query is None:
            raise DataError(f"{where}: {queries} has no query {query_id!r}.")
        if document is None:
            raise DataError(f"{where}: {corpus} has no document {document_id!r}.")
        if (query, document) in seen:
            raise DataError(f"{where}: document {document_id!r} is judged twice for query {query_id!r}.")

        seen.add((query, document))

        if grade > 0:
            judged[query][document] = grade
        else:
            judged[query]  # Judged, hence of this split, but not relevant.

    order = sorted(judged)
    return _checked(RetrievalTask([query_items[i] for i in order], documents, [judged[i] for i in order]))


def _read_items(file: Path, image_root: str | os.PathLike[str] | None) -> tuple[dict[str, int], list[Item]]:
    source = RowSource(file)

    root = os.path.realpath(image_root or file.parent)
    ids: dict[str, int] = {}
    items: list[Item] = []
    for i in range(len(source)):
        try:
            name, item = _read_item(source[i], root, source.untyped)
        except RowError as ex:
            raise DataError(f"{source.where(i)}: {ex}") from None

        if name in ids:
            raise DataError(f"{source.where(i)}: the id {name!r} is also the id of {source.where(ids[name])}.")

        ids[name] = i
        items.append(replace(item, source=source.where(i)) if item.images else item)

    return ids, items


def _read_item(row: Mapping[str, object], root: str, untyped: bool) -> tuple[str, Item]:
    values = dict(row)

    name = values.get("_id", values.get("id"))
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise RowError("has no '_id' that is a string or an integer.")

    title, text = values.get("title"), values.get("text")
    if title is not None and not isinstance(title, str):
        raise RowError(f"'title' must be a text, but is {title!r}.")

    if title and isinstance(text, str):
        values["text"] = f"{title} {text}".strip()
    elif title and text is None:
        values["text"] = title
    elif text == "" and values.get("image"):
        values["text"] = None  # Corpora of images often have an empty text in every row.

    layout = Layout({key: key for key in ("text", "image") if key in values}, ())

    item = RowReader(values, layout, root, allow_urls=False, untyped=untyped).item("text", "image", None)
    if item is None:
        raise RowError("has neither 'text' nor 'image'.")

    return str(name), item


def _read_qrels(file: Path) -> Iterator[tuple[str, str, str, float]]:
    """Yield each judgement's place, query id, document id and grade."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as ex:
        raise DataError(f"{file} cannot be read: {ex.strerror or ex}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8.") from None

    found = False
    for number, line in enumerate(lines, 1):
        fields = line.split("\t") if line.count("\t") >= 2 else line.split()
        if not line.strip() or (number == 1 and _grade(fields[-1]) is None):
            continue  # The header of BEIR's files.

        where = f"{file}:{number}"
        if len(fields) not in (3, 4):
            raise DataError(f"{where}: a judgement has 3 or 4 (TREC) columns, but this line has {len(fields)}.")

        grade = _grade(fields[-1])
        if grade is None:
            raise DataError(f"{where}: the grade must be a finite number, but is {fields[-1]!r}.")

        found = True
        yield where, fields[0], fields[-2], grade

    if not found:
        raise DataError(f"{file} has no judgements.")


def _grade(text: str) -> float | None:
    try:
        grade = float(text)
    except ValueError:
        return None
    return grade if math.isfinite(grade) else None

"""What to evaluate on: queries, documents, and which of them belong together."""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from vembed_fs2.data.cache import COMPRESSIONS, format_of, unpacked
from vembed_fs2.data.example import Example, Item
from vembed_fs2.data.row import Layout, RowError, RowReader, is_missing
from vembed_fs2.data.schema import content_id
from vembed_fs2.data.sources import RowSource
from vembed_fs2.errors import ConfigError, DataError
from vembed_fs2.evaluation.task import NOTHING_RELEVANT, RetrievalTask

log = logging.getLogger("vembed_fs2")

TIES: Final = ("corpus", "trec_eval")
"""The orders of documents with the same score."""


def task_from_examples(examples: Sequence[Example]) -> RetrievalTask:
    """Make a task of rows as they are used for training.

    - The documents are the positives and the negatives; the same content (see
      :func:`~vembed_fs2.data.schema.content_id`) is one document.
    - Rows with the same query are one query; all their positives are relevant.
    - A row's label is its positive's label as well: all documents with the
      label of a query are relevant.
    - A query that is itself a document (rows written in both directions) does
      not find itself, unless it is its own positive.
    - If no row has a positive, the rows are searched among themselves: every
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

    def find(self, item: Item) -> int:
        """Return the position of an item with the same content, whatever its instruction; -1 if there is none."""
        return self._positions.get(content_id(replace(item, instruction=None)), -1)


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

    own = [corpus.find(query) for query in queries.items]
    exclude = [-1 if document in relevant[query] else document for query, document in enumerate(own)]
    return RetrievalTask(queries.items, corpus.items, relevant, exclude=exclude if max(exclude) >= 0 else ())


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


def find_task(
    paths: Sequence[Path],
    files: tuple[Path | None, Path | None, Path | None] = (None, None, None),
    split: str = "test",
    *,
    image_root: str | os.PathLike[str] | None = None,
    quoting: str = "rfc4180",
    ties: str = "corpus",
    row_options: Mapping[str, bool] | None = None,
) -> RetrievalTask | None:
    """Read the task that ``paths`` (a folder in the layout of BEIR) or ``files`` hold; ``None`` if ``paths`` are rows.

    :param files: queries, corpus and qrels.
    :param row_options: the names of options that only files of rows have -> whether they are given.
    :raises DataError: neither or both are given, or see :func:`task_from_files`.
    :raises ConfigError: an option is given that this kind of data does not have.
    """
    if any(files) if paths else not all(files):
        raise DataError(
            "The data must be files of rows, one folder with queries, corpus and qrels, or these three files."
        )

    folders = [path for path in map(_expanded, paths) if path.is_dir() and any(path.glob("qrels*"))]
    if not all(files) and (not folders or len(paths) > 1):
        if folders:
            raise DataError(f"{folders[0]} holds a task (queries, corpus and qrels), and must be the only one.")
        if ties != "corpus":
            where = "The evaluation"
            raise ConfigError("`ties` needs the ids of documents, which files of rows do not have.", where=where)
        return None

    if given := [f"`{name}`" for name, is_given in (row_options or {}).items() if is_given]:
        raise ConfigError(f"{', '.join(given)}: only for files of rows, not for queries, corpus and qrels.")

    if folders:
        return task_from_folder(folders[0], split, image_root=image_root, quoting=quoting, ties=ties)

    queries, corpus, qrels = files
    assert queries is not None
    assert corpus is not None
    assert qrels is not None
    return task_from_files(queries, corpus, qrels, image_root=image_root, quoting=quoting, ties=ties)


def _expanded(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(path))


def task_from_folder(
    folder: str | os.PathLike[str],
    split: str = "test",
    *,
    image_root: str | os.PathLike[str] | None = None,
    quoting: str = "rfc4180",
    ties: str = "corpus",
) -> RetrievalTask:
    """Read a folder in the layout of BEIR: ``corpus``, ``queries`` and ``qrels/<split>.tsv`` or ``qrels.tsv``.

    :raises DataError: a file is missing, or see :func:`task_from_files`.
    """
    folder = _expanded(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder.")

    kinds = (".tsv", ".txt", ".jsonl", ".csv", ".parquet")
    qrels = [folder / name for kind in kinds for name in (f"qrels/{split}{kind}", f"qrels{kind}")]

    return task_from_files(
        _first_file([folder / f"queries{s}" for s in (".jsonl", ".parquet", ".tsv", ".csv")]),
        _first_file([folder / f"corpus{s}" for s in (".jsonl", ".parquet", ".tsv", ".csv")]),
        _first_file(qrels),
        image_root=image_root or folder,
        quoting=quoting,
        ties=ties,
    )


def _first_file(candidates: Sequence[Path]) -> Path:
    for file in candidates:
        for suffix in ("", *COMPRESSIONS):
            if (found := file.with_name(file.name + suffix)).is_file():
                return found
    raise DataError(
        f"{candidates[0]} does not exist (nor {', '.join(str(f) for f in candidates[1:])}, nor one of them with"
        f" {' or '.join(COMPRESSIONS)})."
    )


def task_from_files(
    queries: str | os.PathLike[str],
    corpus: str | os.PathLike[str],
    qrels: str | os.PathLike[str],
    *,
    image_root: str | os.PathLike[str] | None = None,
    quoting: str = "rfc4180",
    ties: str = "corpus",
) -> RetrievalTask:
    """Read a task from three files.

    Queries and documents are rows with ``_id`` (or ``id``), ``text``,
    optionally ``title`` (put before the text) and ``image`` (a path under
    ``image_root``). Judgements are the tab-separated ``query-id corpus-id
    score`` with a header, TREC's four columns ``query 0 document grade``, or rows
    of JSONL, CSV or Parquet with ``query-id``, ``corpus-id`` and ``score``.
    Grades that are not greater than 0 mean "not relevant". Queries without
    any judgement belong to another split and are left out.

    As in BEIR and trec_eval, an empty document can be found, a relevant document
    that the corpus lacks counts as not found, and a query does not find the
    document of its own id (unless that is relevant).

    :param image_root: the folder that images lie in; each file's own folder by default.
    :param quoting: of CSV and TSV files: ``rfc4180``, or ``none`` if a quote is a character like any other.
    :param ties: which of two documents with the same score is ranked first: the one that stands first in the
        ``corpus``; or, with ``trec_eval``, the one whose id is greater, as strings of bytes.

    :raises DataError: a row is broken, a judgement names an unknown query, or two
        judgements differ; the message names file and line. Or no document is relevant.
    """
    if ties not in TIES:
        raise ConfigError(f"`ties` must be one of {', '.join(TIES)}, but is {ties!r}.", where="The evaluation")

    queries, corpus, qrels = map(_expanded, (queries, corpus, qrels))
    query_ids, query_items = _read_items(queries, image_root, quoting)
    document_ids, documents = _read_items(corpus, image_root, quoting, allow_empty=True)
    if ties == "trec_eval":
        # Of equal scores the first document wins.
        greatest_first = sorted(document_ids, key=lambda name: name.encode("utf-8"), reverse=True)
        documents = [documents[document_ids[name]] for name in greatest_first]
        document_ids = {name: position for position, name in enumerate(greatest_first)}

    judged: dict[int, dict[int, float]] = defaultdict(dict)
    missing: dict[int, list[float]] = defaultdict(list)
    seen: dict[tuple[int, str], float] = {}
    num_repeated = 0
    for where, query_id, document_id, grade in _read_qrels(qrels, query_ids, quoting):
        query, document = query_ids.get(query_id), document_ids.get(document_id)
        if query is None:
            raise DataError(f"{where}: {queries} has no query {query_id!r}.")
        judged[query]  # A judged query is of this split, even if nothing is relevant to it.

        if (query, document_id) in seen:
            if seen[query, document_id] != grade:
                raise DataError(f"{where}: document {document_id!r} has two grades for query {query_id!r}.")
            num_repeated += 1
            continue

        seen[query, document_id] = grade
        if grade > 0 and document is not None:
            judged[query][document] = grade
        elif grade > 0:
            missing[query].append(grade)

    num_missing = sum(map(len, missing.values()))
    _warn(sum(item.text == "" for item in documents), f"documents of {corpus} are empty")
    _warn(num_missing, f"relevant documents are not in {corpus}, and count as not found")
    _warn(num_repeated, f"judgements of {qrels} are repeated, and count once")

    order = sorted(judged)
    names = {position: name for name, position in query_ids.items()}
    own = [document_ids.get(names[query], -1) for query in order]
    exclude = [-1 if document in judged[query] else document for query, document in zip(order, own)]
    return _checked(
        RetrievalTask(
            [query_items[i] for i in order],
            documents,
            [judged[i] for i in order],
            exclude=exclude if max(exclude, default=-1) >= 0 else (),
            missing=[missing[i] for i in order] if num_missing else (),
        )
    )


def _warn(count: int, what: str) -> None:
    if count:
        log.warning("%s %s.", f"{count:,}", what)


def _read_items(
    file: Path, image_root: str | os.PathLike[str] | None, quoting: str, *, allow_empty: bool = False
) -> tuple[dict[str, int], list[Item]]:
    """
    :param allow_empty: whether a text may be empty.
    """
    source = _open(file, quoting)

    root = os.path.realpath(_expanded(image_root or file.parent))
    ids: dict[str, int] = {}
    items: list[Item] = []
    for i in range(len(source)):
        try:
            name, item = _read_item(source[i], root, source.untyped, allow_empty)
        except RowError as ex:
            raise DataError(f"{source.where(i)}: {ex}") from None

        if name in ids:
            raise DataError(f"{source.where(i)}: the id {name!r} is also the id of {source.where(ids[name])}.")

        ids[name] = i
        items.append(replace(item, source=source.where(i)) if item.images else item)

    return ids, items


def _open(file: Path, quoting: str) -> RowSource:
    source = RowSource(file, quoting)
    if joined := source.find_joined_rows():
        log.warning("%s", joined)
    return source


def _read_item(row: Mapping[str, object], root: str, untyped: bool, allow_empty: bool) -> tuple[str, Item]:
    values = {key: None if is_missing(value) else value for key, value in row.items()}

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

    text = values.get("text")
    if allow_empty and isinstance(text, str) and not text.strip() and not values.get("image"):
        return str(name), Item(text="")

    layout = Layout({key: key for key in ("text", "image") if key in values}, ())

    item = RowReader(values, layout, root, allow_urls=False, untyped=untyped).item("text", "image", None)
    if item is None:
        raise RowError("has neither 'text' nor 'image'.")

    return str(name), item


_JUDGEMENT_KEYS: Final = (
    ("query-id", "query_id", "qid"),
    ("corpus-id", "corpus_id", "document-id", "document_id", "docid"),
    ("score", "grade", "relevance"),
)
"""The names of the columns of judgements, in files that have some."""


def _read_qrels(file: Path, query_ids: Collection[str], quoting: str) -> Iterator[tuple[str, str, str, float]]:
    """Yield each judgement's place, query id, document id and grade.

    :param query_ids: the known queries. A first line that names none of them, and has no grade, is a header.
    """
    of_lines = format_of(file) in (".tsv", ".txt", ".qrels", ".trec", "")
    found = False
    for where, query, document, value in (
        _read_qrels_lines(file, query_ids) if of_lines else _read_qrels_rows(file, quoting)
    ):
        grade = _grade(value)
        if grade is None:
            raise DataError(f"{where}: the grade must be a finite number, but is {value!r}.")

        found = True
        yield where, query, document, grade

    if not found:
        raise DataError(f"{file} has no judgements.")


def _read_qrels_rows(file: Path, quoting: str) -> Iterator[tuple[str, str, str, object]]:
    """Read JSONL, CSV, Parquet and Arrow."""
    source = _open(file, quoting)
    for i in range(len(source)):
        row, values = source[i], []
        for names in _JUDGEMENT_KEYS:
            name = next((name for name in names if row.get(name) is not None), None)
            if name is None:
                columns = ", ".join(map(repr, row))
                raise DataError(f"{source.where(i)}: has no {names[0]!r}. Its columns are {columns}.")
            values.append(row[name])
        yield source.where(i), str(values[0]), str(values[1]), values[2]


def _read_qrels_lines(file: Path, query_ids: Collection[str]) -> Iterator[tuple[str, str, str, object]]:
    """Read BEIR's three columns, and TREC's four."""
    try:
        lines = unpacked(file).read_text(encoding="utf-8-sig").split("\n")
    except OSError as ex:
        raise DataError(f"{file} cannot be read: {ex.strerror or ex}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8.") from None

    for number, line in enumerate(lines, 1):
        fields = line.split("\t") if line.count("\t") >= 2 else line.split()
        if not line.strip():
            continue
        if number == 1 and fields[0] not in query_ids and _grade(fields[-1]) is None:
            continue  # The header of BEIR's files.

        where = f"{file}:{number}"
        if len(fields) == 6 and fields[1] == "Q0":
            raise DataError(
                f"{where}: this is a line of results (query, Q0, document, rank, score, run), not a judgement."
            )
        if len(fields) not in (3, 4):
            raise DataError(f"{where}: a judgement has 3 or 4 (TREC) columns, but this line has {len(fields)}.")

        yield where, fields[0], fields[-2], fields[-1]


def _grade(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        grade = float(value)
    except ValueError:
        return None
    return grade if math.isfinite(grade) else None

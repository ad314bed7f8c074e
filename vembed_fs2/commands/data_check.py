"""``fairseq2 vembed data check``: what is in data files, and what is wrong with them.

Nothing heavy is imported here: the command line needs this module to print help.
"""

from __future__ import annotations

import argparse
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from vembed_fs2.commands.arguments import add_quoting_argument, parse_columns
from vembed_fs2.errors import DataError

if TYPE_CHECKING:
    from vembed_fs2.data.dataset import Problems
    from vembed_fs2.data.example import Example
    from vembed_fs2.data.schema import Columns, RowSchema
    from vembed_fs2.data.sources import Paths, RowSource
    from vembed_fs2.data.usable import DataFacts
    from vembed_fs2.losses import Objective

Examples: TypeAlias = "tuple[Example, ...]"
"""The examples of a row, one for each of its positives."""

Images: TypeAlias = Literal["all", "sample", "none"]

_SAMPLED_ROWS: Final = 1000

_SHOWN: Final = 20

_BLOCK: Final = 256
"""Rows that are read before the images of any are decoded, in parallel."""


class Distribution:
    """The distribution of a number."""

    def __init__(self) -> None:
        self.values = array("Q")

    def add(self, value: int) -> None:
        self.values.append(value)

    def __str__(self) -> str:
        import numpy as np

        ordered = np.sort(np.frombuffer(self.values, dtype=np.uint64))
        low, median, p95, high = (int(ordered[math.ceil(q * len(ordered)) - 1]) for q in (1e-12, 0.5, 0.95, 1))
        return f"min {low:,}, median {median:,}, p95 {p95:,}, max {high:,}"


class Repeats:
    """Counts what was seen before, by hash."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.count = 0

    def add(self, value: int) -> None:
        if value in self.seen:
            self.count += 1
        self.seen.add(value)


@dataclass
class Report:
    """What :func:`check_dataset` found."""

    files: tuple[Path, ...]
    num_rows: int

    problems: Problems
    """All are counted; the first 20 are kept, each with its ``file:line``."""

    num_usable: int = 0

    modes: Counter[str] = field(default_factory=Counter)
    """The number of rows of each mode."""

    lengths: dict[str, Distribution] = field(default_factory=dict)
    """The lengths of texts in characters, by role."""

    num_images: int = 0
    widths: Distribution = field(default_factory=Distribution)
    heights: Distribution = field(default_factory=Distribution)
    """The sizes of the images that were decoded, in pixels, upright."""

    num_negatives: Counter[int] = field(default_factory=Counter)
    """Number of negatives of a row -> number of such rows."""

    labels: Counter[str] = field(default_factory=Counter)
    """Label -> number of rows."""

    facts: DataFacts = field(default_factory=lambda: _no_facts())
    """What the usable rows hold."""

    objectives: dict[str, list[str]] = field(default_factory=dict)
    """Objective -> what the data lack for it; nothing if all usable rows can be trained on."""

    other_files: list[str] = field(default_factory=list)
    """Files of folders of classes that hold no row."""

    num_examples: int = 0
    """The number of examples to train on: one for each positive of a usable row."""

    num_positives: Counter[int] = field(default_factory=Counter)
    """Number of positives of a row -> number of such rows, of those that have a positive."""

    queries: Repeats = field(default_factory=Repeats)
    documents: Repeats = field(default_factory=Repeats)
    pairs: Repeats = field(default_factory=Repeats)

    ignored_columns: set[str] = field(default_factory=set)
    """Columns that hold no field."""

    joined_rows: str | None = None
    """A sentence about rows that quotes seem to have joined."""

    @property
    def num_scored(self) -> int:
        """The number of rows with scores."""
        return self.facts.num_scored

    @property
    def ok(self) -> bool:
        """True if every row can be used."""
        return self.problems.count == 0


def check_dataset(
    paths: Paths,
    *,
    columns: Columns | None = None,
    mode: str = "auto",
    image_root: str | os.PathLike[str] | None = None,
    allow_urls: bool = False,
    quoting: str = "rfc4180",
    images: Images = "sample",
) -> Report:
    """Read every row of data files. Memory holds hashes and lengths, not rows.

    :param quoting: of CSV and TSV files: ``rfc4180``, or ``none`` if a quote is a character like any other.
    :param images: which images to decode: of all rows, of about 1,000 evenly
        spaced rows, or none. URLs are not fetched.
    :raises DataError: a file cannot be read at all.
    """
    from vembed_fs2.data.dataset import Problems
    from vembed_fs2.data.images import decode_images, has_images
    from vembed_fs2.data.schema import RowSchema
    from vembed_fs2.data.sources import RowSource

    schema = RowSchema(columns=columns, mode=mode, image_root=image_root, allow_urls=allow_urls)

    source = RowSource(paths, quoting)
    report = Report(
        source.files,
        len(source),
        Problems(_SHOWN),
        other_files=source.other_files,
        joined_rows=source.find_joined_rows(),
    )
    trainable = Trainable()
    every = {"all": 1, "sample": max(1, len(source) // _SAMPLED_ROWS), "none": len(source) + 1}[images]
    for start in range(0, len(source), _BLOCK):
        rows = {i: _read(i, source, schema, report) for i in range(start, min(start + _BLOCK, len(source)))}
        examples = {i: row for i, row in rows.items() if not isinstance(row, DataError)}
        opened = [
            i for i, found in examples.items() if images != "none" and i % every == 0 and any(map(has_images, found))
        ]

        sizes = dict(zip(opened, decode_images([_whole(examples[i]) for i in opened])))
        for index, row in rows.items():
            _count(report, row, sizes.get(index, []), trainable)

    report.objectives = trainable.problems(report)
    return report


class Trainable:
    """Finds which objectives, with their default options, can be trained on the rows."""

    def __init__(self) -> None:
        from vembed_fs2.losses import LOSSES, create_loss

        # Those that are made of others ask for what these ask for.
        names = sorted(name for name in LOSSES if name not in ("combined", "matryoshka"))
        self._losses: dict[str, Objective] = {}
        for name in names:
            loss = create_loss(name)
            self._losses[f"{name} (with a teacher)" if loss.needs_teacher else name] = loss

        self._lacking: dict[str, Counter[str]] = {name: Counter() for name in self._losses}

    def see(self, example: Example) -> None:
        from vembed_fs2.data.usable import missing_in_row

        for name, loss in self._losses.items():
            if (problem := missing_in_row(example, loss)) is not None:
                self._lacking[name][problem] += 1

    def problems(self, report: Report) -> dict[str, list[str]]:
        """Return what the data lack for each objective."""
        from vembed_fs2.data.usable import missing_in_data

        problems: dict[str, list[str]] = {}
        for name, loss in self._losses.items():
            problems[name] = [_of_rows(text, n, report.num_usable) for text, n in self._lacking[name].items()]
            if report.num_usable:
                problems[name] += missing_in_data(report.facts, report.labels.values(), loss)

        return problems


def _of_rows(problem: str, count: int, total: int) -> str:
    return problem if count == total else f"{problem} ({count:,} of {total:,} rows)"


def _no_facts() -> DataFacts:
    from vembed_fs2.data.usable import DataFacts

    return DataFacts()


def _read(index: int, source: RowSource, schema: RowSchema, report: Report) -> Examples | DataError:
    try:
        row = source[index]
        report.ignored_columns |= schema.ignored_columns(row)
        return schema.parse_all(row, source.where(index), source.folder(index), untyped=source.untyped)
    except DataError as ex:
        return ex


def _whole(examples: Examples) -> Example:
    """The row again, with all of its documents as negatives: what to decode of it."""
    first = examples[0]
    more = (example.positive for example in examples[1:] if example.positive is not None)
    return replace(first, negatives=(*first.negatives, *more))


def _count(
    report: Report, row: Examples | DataError, sizes: list[tuple[int, int]] | DataError, trainable: Trainable
) -> None:
    """Count a row, or what is wrong with it or its images."""
    if isinstance(row, DataError) or isinstance(sizes, DataError):
        report.problems.add(str(row if isinstance(row, DataError) else sizes))
        return

    for width, height in sizes:
        report.widths.add(width)
        report.heights.add(height)

    trainable.see(row[0])  # Its other examples hold the same, but for the positive.
    _count_content(report, row)


def _count_content(report: Report, examples: Examples) -> None:
    from vembed_fs2.data.schema import content_id, kind_of

    example = examples[0]
    positives = [example.positive for example in examples if example.positive is not None]

    report.num_usable += 1
    report.num_examples += len(examples)
    query = content_id(example.query)
    report.queries.add(query)

    if not positives:
        report.modes[f"{kind_of(example.query)} with a label only"] += 1
    else:
        report.num_positives[len(positives)] += 1
    for positive in positives:
        report.modes[f"{kind_of(example.query)}2{kind_of(positive)}"] += 1
        document = content_id(positive)
        report.documents.add(document)
        report.pairs.add(hash((query, document)))

    items = [
        ("query", example.query),
        *(("positive", p) for p in positives),
        *(("negative", n) for n in example.negatives),
    ]
    for role, item in items:
        report.num_images += len(item.images)
        if item.text is not None:
            report.lengths.setdefault(role, Distribution()).add(len(item.text))

    report.num_negatives[len(example.negatives)] += 1
    for one in examples:
        report.facts.add(one)
    if example.label is not None:
        report.labels[example.label] += 1


def render(report: Report) -> str:
    """Write a report as text."""
    files = str(report.files[0]) if len(report.files) == 1 else f"{len(report.files):,} files"

    lines = [("files", files), ("rows", f"{report.num_rows:,}, usable {report.num_usable:,}")]
    lines += [("mode", f"{mode}: {count:,}") for mode, count in report.modes.most_common()]
    lines += [(f"{role} text", f"{spread} characters") for role, spread in report.lengths.items()]
    if report.num_images:
        lines.append(("images", f"{report.num_images:,}, decoded {len(report.widths.values):,}"))
    if report.widths.values:
        lines += [("image width", f"{report.widths} pixels"), ("image height", f"{report.heights} pixels")]
    if report.num_examples > report.num_usable:
        lines += [("rows with", f"{n} positives: {c:,}") for n, c in sorted(report.num_positives.items())]
        lines.append(("to train on", f"{report.num_examples:,}, one for each positive"))
    if any(report.num_negatives):
        lines += [("rows with", f"{n} negatives: {c:,}") for n, c in sorted(report.num_negatives.items())]

    if report.labels:
        alone = sum(count == 1 for count in report.labels.values())
        lines.append(("labels", f"{len(report.labels):,}, of one row only {alone:,}"))

    if report.num_scored:
        lines.append(("with scores", f"{report.num_scored:,}"))

    repeats = (("queries", report.queries), ("documents", report.documents), ("pairs", report.pairs))
    lines.append(("repeated", ", ".join(f"{name} {r.count:,}" for name, r in repeats)))

    if report.ignored_columns:
        lines.append(("ignored", f"columns {', '.join(sorted(report.ignored_columns))}"))

    if report.joined_rows:
        lines.append(("warning", report.joined_rows))

    if report.other_files:
        first = ", ".join(report.other_files[:3]) + (", ..." if len(report.other_files) > 3 else "")
        lines.append(("other files", f"{len(report.other_files):,}, not read: {first}"))

    lines += _objective_lines(report)
    text = "\n".join(f"{name + ':':<15} {value}" for name, value in lines)
    if report.ok:
        return f"{text}\nNo problems found."

    return f"{text}\n{report.problems.count:,} problems:\n{report.problems}"


def _objective_lines(report: Report) -> Iterator[tuple[str, str]]:
    """The objectives that can be trained on all usable rows, and what the others lack."""
    if not report.num_usable:
        return

    by_problem: dict[str, list[str]] = {}
    for name, problems in report.objectives.items():
        by_problem.setdefault(problems[0] if problems else "", []).append(name)

    if able := by_problem.pop("", []):
        yield "trains", ", ".join(able)
    for problem, names in by_problem.items():
        yield "does not train", f"{', '.join(names)}: {problem}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``data check``."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="a data file, a pattern ('data/*.jsonl'), a folder of shards or of classes",
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the file's name for a field, such as query=title; no name leaves the field out; can be repeated",
    )
    parser.add_argument("--mode", default="auto", help="auto, t2t, t2i, i2i, i2t, m2i or m2t (default: auto)")
    parser.add_argument("--image-root", type=Path, metavar="FOLDER", help="where images are (default: the file's own)")
    parser.add_argument("--allow-urls", action="store_true", help="accept HTTP(S) URLs as images")
    add_quoting_argument(parser)
    parser.add_argument(
        "--images",
        choices=("all", "sample", "none"),
        default="sample",
        help="which images to decode: of all rows, of about 1,000 rows, or none (default: sample)",
    )


def run(args: argparse.Namespace) -> int:
    """Check and print; return 1 if there are problems.

    :raises VembedError: a file cannot be read at all, or an argument is not valid.
    """
    report = check_dataset(
        args.files,
        columns=parse_columns(args.column),
        mode=args.mode,
        image_root=args.image_root,
        allow_urls=args.allow_urls,
        quoting=args.quoting,
        images=args.images,
    )
    print(render(report))
    return 0 if report.ok else 1

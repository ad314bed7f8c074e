"""Formats, shards and their errors."""

from __future__ import annotations

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed_fs2.data import tables
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.sources import RowSource
from vembed_fs2.errors import DataError

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow")


def write(file: Path, rows: list[dict]) -> Path:
    """Write rows of one set of columns in the format that the name of the file says."""
    suffix = file.suffix[1:]
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8", newline="")
    elif suffix == "json":
        file.write_text(json.dumps(rows), "utf-8")
    elif suffix in ("csv", "tsv"):
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter="," if suffix == "csv" else "\t")
            writer.writerow(rows[0])
            for row in rows:
                writer.writerow([json.dumps(v) if isinstance(v, list) else v for v in (row[k] for k in rows[0])])
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(file), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    return file


ROWS = [
    {"query": "a", "positive": "x, y", "negatives": ["n1", "n\n2"], "label": 1, "scores": [0.5, 0.25, 0]},
    {"query": 'b "quoted"', "positive": "über\r\nline", "negatives": [], "label": None, "scores": [1.0]},
    {"query": "c\ttab", "positive": "日本語 🙂", "negatives": ["[not, a list"], "label": 2, "scores": []},
]

texts = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0")
    | st.sampled_from([*list('"\n\r\t,[]{}\\ '), "\u2028", "\ufeff"]),
    min_size=1,
).filter(lambda t: not t.isspace())

rows_of_texts = st.lists(
    st.fixed_dictionaries(
        {"query": texts, "positive": texts, "negatives": st.lists(texts, max_size=3), "label": texts | st.none()}
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    expected = ExampleDataset(write(tmp_path / "e.jsonl", ROWS))
    actual = ExampleDataset(write(tmp_path / f"a.{suffix}", ROWS))

    assert [actual[i] for i in range(len(actual))] == [expected[i] for i in range(len(expected))]
    assert actual[0].negatives[1].text == "n\n2"
    assert actual[1].positive is not None
    assert actual[1].positive.text == "über\r\nline"
    assert [e.label for e in (actual[0], actual[1])] == ["1", None]


@settings(max_examples=60)
@given(rows_of_texts)
def test_texts_survive_every_format(rows: list[dict]) -> None:
    with TemporaryDirectory() as folder:
        for suffix in FORMATS:
            dataset = ExampleDataset(write(Path(folder) / f"x.{suffix}", rows))
            read = [dataset[i] for i in range(len(dataset))]
            assert [e.query.text for e in read] == [r["query"] for r in rows]
            assert [e.positive and e.positive.text for e in read] == [r["positive"] for r in rows]
            assert [[n.text for n in e.negatives] for e in read] == [r["negatives"] for r in rows]
            assert [e.label for e in read] == [r["label"] for r in rows]


@pytest.mark.parametrize("suffix", FORMATS)
def test_shards_are_one_sequence_in_the_order_of_their_names(tmp_path: Path, suffix: str) -> None:
    for shard in (2, 0, 1):
        write(tmp_path / f"part-{shard}.{suffix}", [{"query": f"{shard}{i}"} for i in range(3)])
    (tmp_path / "README.md").write_text("no data")

    source = RowSource(tmp_path)

    assert [source[i]["query"] for i in range(len(source))] == [f"{s}{i}" for s in range(3) for i in range(3)]
    assert source.where(4).startswith(str(tmp_path / f"part-1.{suffix}") + ":")


def test_a_list_of_files_keeps_its_order(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{n}.jsonl", [{"query": n}]) for n in ("b", "a")]
    source = RowSource(files)
    assert [source[i]["query"] for i in range(2)] == ["b", "a"]
    with pytest.raises(IndexError):
        source[2]


def test_jsonl_details(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"q": 1}\r\n\r\n  \n{"q": "a\xe2\x80\xa8b"}\n{"q": 3}')
    source = RowSource(file)
    assert [source[i]["q"] for i in range(3)] == [1, "a\u2028b", 3]
    assert [source.where(i) for i in range(3)] == [f"{file}:{n}" for n in (1, 4, 5)]


def test_csv_details(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(b'\xef\xbb\xbfq,p\r\n"a\n\nb",1\n\nc,"2 ""x"""\n5" disk,3')
    source = RowSource(file)
    assert [source[i] for i in range(3)] == [
        {"q": "a\n\nb", "p": "1"},
        {"q": "c", "p": '2 "x"'},
        {"q": '5" disk', "p": "3"},
    ]
    assert [source.where(i) for i in range(3)] == [f"{file}:{n}" for n in (2, 6, 7)]


def test_a_long_csv_field(tmp_path: Path) -> None:
    source = RowSource(write(tmp_path / "x.csv", [{"q": "x" * 500_000}]))
    assert len(source[0]["q"]) == 500_000


def test_metadata_beside_arrow_shards_is_no_data(tmp_path: Path) -> None:
    write(tmp_path / "data-00000.arrow", ROWS)
    (tmp_path / "state.json").write_text("{}")
    assert len(RowSource(tmp_path)) == 3


def test_large_parquet_is_mapped_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write(tmp_path / "x.parquet", ROWS)
    for _ in range(2):
        source = RowSource(file)
        assert [source[i] for i in range(3)] == ROWS
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    assert source.where(2) == f"{file}:row 3"


def test_reads_from_many_threads(tmp_path: Path) -> None:
    for shard in range(4):
        write(tmp_path / f"{shard}.jsonl", [{"q": shard * 100 + i, "pad": "x" * i} for i in range(100)])
    source = RowSource(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[i]["q"], range(400))) == list(range(400))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"q": 1}\n\n{"q": \n', r"x.jsonl:3: not valid JSON: Expecting value at column"),
        ("x.jsonl", '{"q": 1}\n[1]\n', r"x.jsonl:2: a row must be a JSON object, but is a list"),
        ("x.jsonl", '{"q": 1}\n"a"', r"x.jsonl:2: a row must be a JSON object, but is a string"),
        ("x.jsonl", b'{"q": 1}\n{"q": "\xff"}', r"x.jsonl:2: the text is not UTF-8"),
        ("x.jsonl", "[" * 100_000, r"x.jsonl:1: the JSON is nested too deeply"),
        ("x.jsonl", "", r"x.jsonl has no rows"),
        ("x.jsonl", "\n \n", r"x.jsonl has no rows"),
        ("x.json", "[]", r"x.json has no rows"),
        ("x.json", "{}", r"x.json must hold a list of objects, but holds an object"),
        ("x.json", '{"q": 1}\n{"q": 1}', r"x.json is not valid JSON.*name it .jsonl"),
        ("x.json", "[{}, 1]", r"x.json:row 2: a row must be a JSON object, but is a number"),
        ("x.csv", "", r"x.csv has no rows"),
        ("x.csv", "q,p\n", r"x.csv has no rows"),
        ("x.csv", 'q,p\n"a\nb",c\nd\n', r"x.csv:4: the row has 1 fields, but the header has 2"),
        ("x.csv", "q,p\na,b,c\n", r"x.csv:2: the row has 3 fields, but the header has 2"),
        ("x.csv", 'q,p\na,b\n"c,d\n', r"x.csv:3: not valid CSV: unexpected end of data"),
        ("x.csv", 'q,p\n"a"b,c\n', r"x.csv:2: not valid CSV"),
        ("x.csv", b"q,p\na,\xff\n", r"x.csv:2: the text is not UTF-8"),
        ("x.csv", "q,q\na,b\n", r"x.csv: the header names the column 'q' twice"),
        ("x.csv", "q,\na,b\n", r"x.csv: the header has a column without a name"),
        ("x.tsv", "q\tp\na,b\n", r"x.tsv:2: the row has 1 fields, but the header has 2"),
        ("x.parquet", "not parquet", r"x.parquet is not a readable Parquet file"),
        ("x.arrow", "not arrow", r"x.arrow is not a readable Arrow file"),
        ("x.txt", "a", r"x.txt has an unknown format; known are .jsonl, .csv"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())

    def read_all() -> None:
        source = RowSource(file)
        for i in range(len(source)):
            source[i]

    with pytest.raises(DataError, match=re.escape(str(tmp_path)) + "/" + message):
        read_all()


def test_errors_of_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl does not exist"):
        RowSource(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="has no data files"):
        RowSource(tmp_path)
    with pytest.raises(DataError, match="No data file is given"):
        RowSource([])
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.csv", ROWS)
    with pytest.raises(DataError, match=r"same format, but there are .*a\.jsonl and .*b\.csv"):
        RowSource(tmp_path)

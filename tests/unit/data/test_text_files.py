"""Quotes, keys that stand twice, columns without names, compressed files and patterns."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from vembed_fs2.commands.data_check import check_dataset, render
from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.sources import RowSource
from vembed_fs2.errors import ConfigError, DataError
from vembed_fs2.evaluation.datasets import task_from_files

UNBALANCED = 'query\tpositive\nq1\t"Faust is a play.\nq2\tBerlin is a city."\nq3\t"a" or b\n'

PAIR = {"query": "q", "positive": "p"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(file: Path, text: str) -> Path:
    file.write_text(text, "utf-8", newline="")
    return file


def rows(*names: str, **options: str) -> list[dict[str, object]]:
    source = RowSource(list(names), **options)
    return [source[i] for i in range(len(source))]


def test_without_quoting_a_quote_is_a_character(tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", UNBALANCED)
    dataset = ExampleDataset(file, quoting="none")
    assert [(e.query.text, e.positive.text, e.source[-1]) for e in dataset if e.positive is not None] == [
        ("q1", '"Faust is a play.', "2"),
        ("q2", 'Berlin is a city."', "3"),
        ("q3", '"a" or b', "4"),
    ]

    comma = write(tmp_path / "x.csv", '\ufeffq,p\r\n"a,b"\r\n\r\nc\rd,e"\r\n')
    assert rows(str(comma), quoting="none") == [{"q": '"a', "p": 'b"'}, {"q": "c\rd", "p": 'e"'}]
    source = RowSource(comma, "none")
    assert [source.where(i).rpartition(":")[2] for i in range(2)] == ["2", "4"]

    with pytest.raises(ConfigError, match="`quoting` must be 'rfc4180' or 'none', but is 'auto'"):
        RowSource(file, "auto")


@pytest.mark.parametrize("text", [UNBALANCED.replace('\t"a"', "\ta"), 'query\tpositive\nq0\tp\n\nq1\t"a\tb"\n'])
def test_quotes_that_join_rows_or_fields_of_tsv_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    file = write(tmp_path / "x.tsv", text)
    line = 4 if "q0" in text else 2
    sentence = f"{file}:{line}: a quoted field holds a tab or a line break"

    with caplog.at_level(logging.WARNING):
        ExampleDataset(file)
    (record,) = caplog.records
    assert sentence in record.getMessage()
    assert "(1 in all)" in record.getMessage()
    assert "set `quoting` to 'none'" in record.getMessage()

    report = check_dataset(file)
    assert report.ok
    assert f"warning:        {sentence}" in render(report)


def test_quotes_that_do_not_join_anything_are_no_warning(tmp_path: Path) -> None:
    text = 'query{0}positive\n"a ""b"""{0}"c d"\n'
    assert RowSource(write(tmp_path / "x.tsv", text.format("\t"))).find_joined_rows() is None
    assert RowSource(write(tmp_path / "x.csv", text.format(",") + '"a\nb",c\td\n')).find_joined_rows() is None
    assert RowSource(write(tmp_path / "y.tsv", UNBALANCED), "none").find_joined_rows() is None


@pytest.mark.parametrize("broken", ['q3\t"a" or b\n', 'q3\t"a\n'])
def test_a_broken_quote_names_the_option(tmp_path: Path, broken: str) -> None:
    file = write(tmp_path / "x.tsv", "query\tpositive\nq0\tp\n" + broken)
    with pytest.raises(DataError, match=r"x.tsv:3: not valid TSV: .*set `quoting` to 'none'\.$"):
        RowSource(file)


def test_queries_and_corpus_without_quoting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    queries = write(tmp_path / "queries.tsv", '_id\ttext\nq1\t"who\nq2\tcapital"\n')
    corpus = write(tmp_path / "corpus.tsv", '_id\ttext\nd1\t"Faust\nd2\tBerlin"\n')
    qrels = write(tmp_path / "qrels.csv", "query-id,corpus-id,score\nq1,d1,1\n")

    task = task_from_files(queries, corpus, qrels, quoting="none")
    assert [item.text for item in (*task.queries, *task.corpus)] == ['"who', '"Faust', 'Berlin"']

    with caplog.at_level(logging.WARNING):
        task = task_from_files(queries, corpus, qrels)
    assert len(task.corpus) == 1
    assert [r.getMessage().split(": ")[0] for r in caplog.records] == [f"{queries}:2", f"{corpus}:2"]


TWICE = [
    ("x.jsonl", '{"query": "q", "positive": "p"}\n{"query": "a", "query": "b"}\n', "2: the key 'query'"),
    ("x.jsonl", '{"query": {"text": "a", "text": "b"}, "positive": "p"}\n', "1: the key 'text'"),
    ("x.jsonl", '{"query": "q", "positive": "p", "extra": [{"a": 1, "a": 1}]}\n', "1: the key 'a'"),
    ("x.jsonl.gz", '{"query": "q", "positive": "p"}\n\n{"query": "a", "query": "a"}\n', "3: the key 'query'"),
    ("x.json", '[{"query": "q", "positive": "p"},\n {"q": "[{}]",\n "a": 1},\n {"a": 1, "a": 2}]', "4: the key 'a'"),
    ("x.json", '\ufeff{"rows": 1,\n "rows": 2}', "1: the key 'rows'"),
    ("x.csv", 'query,neg\nq,"[{""t"": ""a"", ""t"": ""b""}]"\n', "2: 'neg' is not valid JSON: the key 't'"),
    ("x.csv", 'query\n"[{""text"": ""a"", ""text"": ""b""}]"\n', "2: 'query' is not valid JSON: the key 'text'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), TWICE)
def test_a_key_that_stands_twice_is_an_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    sentence = f"{file}:{message} stands twice in one object."

    with pytest.raises(DataError) as caught:
        ExampleDataset(file)
    assert sentence in str(caught.value)

    if not name.endswith(".json"):
        assert sentence in check_dataset(file).problems.first


def test_json_in_a_text_may_have_what_keys_it_likes(tmp_path: Path) -> None:
    text = '[{""a"": 1, ""a"": 2}]'
    dataset = ExampleDataset(write(tmp_path / "x.csv", f'query,positive\nq,"{text}"\n'))
    assert dataset[0].positive is not None
    assert dataset[0].positive.text == '[{"a": 1, "a": 2}]'


@pytest.mark.parametrize("file", ["queries.jsonl", "corpus.jsonl", "qrels.jsonl"])
def test_a_key_that_stands_twice_in_a_task(tmp_path: Path, file: str) -> None:
    good = {
        "queries.jsonl": '{"_id": "q", "text": "a"}\n',
        "corpus.jsonl": '{"_id": "d", "text": "b"}\n',
        "qrels.jsonl": '{"query-id": "q", "corpus-id": "d", "score": 1}\n',
    }
    files = [write(tmp_path / name, text) for name, text in good.items()]
    assert len(task_from_files(*files).queries) == 1

    write(tmp_path / file, good[file].replace("}", ', "score": 0, "score": 1}'))
    with pytest.raises(DataError, match=f"{file}:1: the key 'score' stands twice in one object"):
        task_from_files(*files)


def test_a_column_that_stands_twice_in_a_table(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["query", "query"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet has the column 'query' twice"):
        RowSource(tmp_path / "x.parquet")

    inner = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), pa.schema([("neg", pa.list_(inner.type))])) as stream:
        stream.write_table(pa.table({"neg": pa.ListArray.from_arrays([0, 1], inner)}))
    with pytest.raises(DataError, match=r"x.arrow has the column 'neg.text' twice"):
        RowSource(tmp_path / "x.arrow")


@pytest.mark.parametrize("index", [",", ",,", '" ",'])
def test_the_index_that_pandas_writes_is_ignored(tmp_path: Path, index: str) -> None:
    values = "".join(f"{i}," for i in range(index.count(",")))
    file = write(tmp_path / "x.csv", f"{index}query,positive\n{values}q,p\n")
    report = check_dataset(file)
    assert report.ok
    assert report.ignored_columns == {f"(index {i + 1})" for i in range(index.count(","))}
    assert ExampleDataset(file)[0].query.text == "q"

    table = write(tmp_path / "x.tsv", file.read_text().replace(",", "\t"))
    assert ExampleDataset(table)[0].query.text == "q"

    with pytest.raises(DataError, match="the header has a column without a name"):
        RowSource(write(tmp_path / "y.csv", "query,,positive\nq,1,p\n"))


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "json"])
def test_compressed_files_are_read_as_their_content(tmp_path: Path, kind: str, suffix: str) -> None:
    separator = "\t" if kind == "tsv" else ","
    texts = {
        "jsonl": "".join(json.dumps({"query": f"q{i}", "positive": "é\n"}) + "\n" for i in range(9)),
        "json": json.dumps([{"query": f"q{i}", "positive": "é\n"} for i in range(9)]),
        "csv": f"query{separator}positive\n" + "".join(f'q{i}{separator}"é\n"\n' for i in range(9)),
    }
    plain = tmp_path / f"x.{kind}"
    plain.write_text(texts["csv" if kind == "tsv" else kind], "utf-8", newline="")
    packed = tmp_path / f"y.{kind}{suffix.upper() if kind == 'csv' else suffix}"
    # Several members, as `cat a.gz b.gz` and programs that work in parallel make them.
    data = plain.read_bytes()
    packed.write_bytes(PACKED[suffix](data[:20]) + PACKED[suffix](data[20:]))

    want, got = RowSource(plain), RowSource(packed)
    assert [got[i] for i in (8, 0, 4)] == [want[i] for i in (8, 0, 4)]
    assert got.where(3) == want.where(3).replace(str(plain), str(packed))
    assert got.untyped == want.untyped
    assert check_dataset(packed).ok


def test_a_compressed_file_is_unpacked_once_and_again_if_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl.gz"

    def put(text: str) -> None:
        file.write_bytes(gzip.compress(text.encode()))

    put('{"q": 1}\n')
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: RowSource(file)[0], range(8))) == [{"q": 1}] * 8
    folder = tmp_path / "cache/vembed_fs2/unpacked"
    (copy,) = folder.glob("*.jsonl")
    before = copy.stat().st_mtime_ns, RowSource(file).fingerprints()
    assert (copy.stat().st_mtime_ns, RowSource(file).fingerprints()) == before

    put('{"q": 2}\n{"q": 3}\n')
    assert RowSource(file)[1] == {"q": 3}
    assert RowSource(file).fingerprints() != before[1]
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("cut", [0, 8, 200])
def test_a_broken_compressed_file_is_an_error_and_leaves_nothing(tmp_path: Path, suffix: str, cut: int) -> None:
    data = PACKED[suffix]("".join(f'{{"q": {i * 7919}}}\n' for i in range(500)).encode())
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(data[:cut] if cut < 200 else data[:-cut])
    with pytest.raises(DataError, match=r"x.jsonl\.(gz|zst) (cannot be unpacked|has no rows)"):
        RowSource(file)
    file.write_bytes(b"plain text, not compressed at all\n")
    with pytest.raises(DataError, match=r"x.jsonl\.(gz|zst) cannot be unpacked"):
        RowSource(file)
    assert not [f for f in (tmp_path / "cache/vembed_fs2/unpacked").iterdir() if f.name.endswith(".tmp")]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"q": 1}\n'))
    with pytest.raises(DataError, match=r"x.jsonl.gz cannot be unpacked: Not a directory"):
        RowSource(file)


def test_unknown_formats_are_named(tmp_path: Path) -> None:
    for name in ("x.parquet.gz", "x.gz", "x.txt", "x.jsonl.bz2"):
        write(tmp_path / name, "")
        with pytest.raises(DataError, match=r"has an unknown format; known are .jsonl, .*with .gz or .zst\."):
            RowSource(tmp_path / name)


def test_patterns_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/2.jsonl", "a/10.jsonl", "a/deep/x.jsonl", "b[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, json.dumps({"q": name}) + "\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"q": "c"}\n'))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    assert [r["q"] for r in rows("a/*.jsonl")] == ["a/10.jsonl", "a/2.jsonl"]
    assert [r["q"] for r in rows("~/a/?.jsonl", "~/b[1].jsonl")] == ["a/2.jsonl", "b[1].jsonl"]
    assert [r["q"] for r in rows("a/**/*.jsonl")] == ["a/10.jsonl", "a/2.jsonl", "a/deep/x.jsonl"]
    assert [r["q"] for r in rows("a/**")] == ["a/10.jsonl", "a/2.jsonl", "a/deep/x.jsonl"]
    assert [r["q"] for r in rows("*.jsonl*")] == ["b[1].jsonl", "c"]

    PILImage.new("RGB", (2, 2)).save(tmp_path / "a/x.png")
    pictures = write(tmp_path / "p.jsonl", json.dumps({"query": "q", "positive_image": "x.png"}) + "\n")
    assert len(ExampleDataset(pictures, image_root="~/a")) == 1

    with pytest.raises(DataError, match=r"d\*.jsonl matches no file"):
        RowSource("d*.jsonl")
    with pytest.raises(DataError, match=r"~nobody-of-this-name/x.jsonl does not exist"):
        RowSource("~nobody-of-this-name/x.jsonl")


@pytest.mark.parametrize("path", ["", "/*"])
def test_a_file_that_is_there_twice_is_an_error(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "x.jsonl", json.dumps(PAIR) + "\n")
    (folder / "x.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    with pytest.raises(DataError, match=r"x.jsonl.gz and .*x.jsonl hold the same rows. Name one of them"):
        RowSource(f"{folder}{path}")

"""Retrieval results, tasks from rows and from files, and reports."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytrec_eval
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from vembed_fs2.data.example import Example, Item
from vembed_fs2.errors import DataError
from vembed_fs2.evaluation import (
    EmbeddingValueError,
    RetrievalTask,
    evaluate_embedder,
    evaluate_retrieval,
    format_results,
    print_results,
    task_from_examples,
    task_from_files,
    task_from_folder,
    write_results,
)

torch.set_num_threads(1)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.booleans(), st.integers(1, 40))
def test_results_equal_trec_eval(seed: int, exclude_self: bool, query_block: int) -> None:
    pytrec_eval: Any = pytest.importorskip("pytrec_eval")
    generator = torch.Generator().manual_seed(seed)
    corpus = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    queries = corpus if exclude_self else torch.randn(12, 6, generator=generator, dtype=torch.float64)
    scores = torch.nn.functional.cosine_similarity(queries[:, None], corpus[None], dim=2).tolist()
    grades = torch.randint(0, 4, (len(queries), 30), generator=generator) * (
        torch.rand(len(queries), 30, generator=generator) < 0.2
    )
    grades[torch.arange(len(queries)), (torch.arange(len(queries)) + 1) % 30] = 2
    relevant = [{d: float(g) for d, g in enumerate(row)} for row in grades.tolist()]
    exclude = list(range(30)) if exclude_self else None
    ours = evaluate_retrieval(
        queries, corpus, relevant, exclude=exclude, query_block=query_block, document_block=query_block + 3
    )
    qrels, run = {}, {}
    for i, row in enumerate(scores):
        kept = [d for d in range(30) if not (exclude_self and d == i)]
        qrels[f"q{i}"] = {f"d{d}": int(relevant[i][d]) for d in kept}
        run[f"q{i}"] = {f"d{d}": row[d] for d in kept}
    measures = {"map", "recip_rank", "recall.1,5,10", "success.1,5,10", "ndcg_cut.10"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run).values()
    names = {"map": "map", "mrr": "recip_rank", "ndcg@10": "ndcg_cut_10"}
    names |= {f"recall@{k}": f"recall_{k}" for k in (1, 5, 10)} | {f"hit@{k}": f"success_{k}" for k in (1, 5, 10)}
    for our, their in names.items():
        assert ours[our] == pytest.approx(np.mean([t[their] for t in theirs]), abs=1e-9), our
    assert (ours["num_queries"], ours["num_documents"]) == (len(queries), 30)


def test_blocks_do_not_change_results() -> None:
    queries, corpus = torch.randn(70, 8), torch.randn(90, 8)
    relevant: list[Any] = [set(range(i % 20)) for i in range(70)]
    expected = evaluate_retrieval(queries, corpus, relevant)
    for query_block, document_block in ((1, 90), (7, 11), (70, 1)):
        found = evaluate_retrieval(queries, corpus, relevant, query_block=query_block, document_block=document_block)
        assert found == pytest.approx(expected)


def test_queries_without_relevant_documents_are_counted_apart() -> None:
    corpus = torch.eye(4)
    results = evaluate_retrieval(corpus, corpus, [{0}, set(), {2: 1.0}, {3: 0.0}])
    assert (results["recall@1"], results["num_queries"], results["num_queries_without_relevant"]) == (1.0, 2, 2)
    with pytest.raises(DataError, match="No query has a relevant document"):
        evaluate_retrieval(corpus, corpus, [{}, {}, {}, {}])


def test_nan_embeddings_never_score() -> None:
    corpus = torch.randn(5, 3)
    with pytest.raises(EmbeddingValueError, match="NaN"):
        evaluate_retrieval(torch.full((5, 3), math.nan), corpus, [{i} for i in range(5)])
    with pytest.raises(ValueError, match="grade"):
        evaluate_retrieval(corpus, corpus, [{0: math.nan}] * 5)


def test_wrong_relevant_documents_are_errors() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="relevant documents of 1"):
        evaluate_retrieval(x, x, [{0}])
    with pytest.raises(ValueError, match="negative"):
        evaluate_retrieval(x, x, [{0}, {-1}])
    with pytest.raises(ValueError, match="names document 2 of 2"):
        evaluate_retrieval(x, x, [{0}, {2}])


# Tasks from rows


def text(*words: str) -> list[Item]:
    return [Item(word) for word in words]


def test_same_content_is_one_document_and_one_query() -> None:
    q1, q2, a, b, c = text("q1", "q2", "a", "b", "c")
    task = task_from_examples(
        [Example(q1, a, negatives=(c,)), Example(q1, b, negatives=(a,)), Example(q2, Item("a"), label=None)]
    )
    assert list(task.queries) == [q1, q2]
    assert list(task.corpus) == [a, c, b]
    assert [dict(r) for r in task.relevant] == [{0: 1.0, 2: 1.0}, {0: 1.0}]
    assert not task.exclude_self


def test_items_with_images_know_their_rows(beir: Path) -> None:
    rows = [Example(Item("q"), Item(images=(b"x",)), source="a.jsonl:3"), Example(Item("r"), Item("d"), source="b")]
    task = task_from_examples(rows)
    assert [item.source for item in (*task.queries, *task.corpus)] == ["", "", "a.jsonl:3", ""]
    assert [item.source for item in task_from_folder(beir).corpus] == ["", "", f"{beir}/corpus.jsonl:3"]


def test_documents_with_the_label_of_a_query_are_relevant() -> None:
    cat, dog, a, b, c = text("cat", "dog", "a", "b", "c")
    rows = [
        Example(cat, a, label="cat"),
        Example(Item("kitten"), b, label="cat"),
        Example(dog, c, label="dog"),
        Example(Item("feline"), label="cat"),
    ]
    task = task_from_examples(rows)
    assert [sorted(r) for r in task.relevant] == [[0, 1], [0, 1], [2], [0, 1]]
    assert task.relevant[0] is task.relevant[1]


def test_rows_of_labels_only_are_searched_among_themselves() -> None:
    items = [Item(images=(Path(f"{i}.jpg"),)) for i in range(4)]
    task = task_from_examples([Example(item, label=label) for item, label in zip(items, "aabc")])
    assert task.exclude_self
    assert list(task.queries) == list(task.corpus) == items

    class Embedder:
        def encode_document(self, inputs: list[Item], *, batch_size: int | None = None) -> Any:
            assert inputs == items
            return np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.0, -1.0]], dtype=np.float32)

        encode_query = None

    results = evaluate_embedder(Embedder(), task)  # type: ignore[arg-type]
    # Both images of class a find each other second, behind the one of class b.
    assert (results["num_queries"], results["num_queries_without_relevant"]) == (2, 2)
    assert (results["hit@1"], results["mrr"]) == (0.0, 0.5)


def test_rows_that_cannot_be_evaluated_are_errors() -> None:
    with pytest.raises(DataError, match="no rows"):
        task_from_examples([])
    with pytest.raises(DataError, match=r"data.jsonl:7 has neither"):
        task_from_examples([Example(Item("q"), Item("d")), Example(Item("q"), source="data.jsonl:7")])
    with pytest.raises(DataError, match="No query has a relevant document"):  # Each is alone with its label.
        task_from_examples([Example(Item("q"), label="a"), Example(Item("r"), label="b")])


def test_an_embedder_of_several_vectors_is_evaluated_by_maxsim() -> None:
    class Embedder:
        def encode_query(self, inputs: Any, *, batch_size: int | None = None) -> Any:
            return [np.eye(3, 4)[:2]] * len(inputs)

        def encode_document(self, inputs: Any, *, batch_size: int | None = None) -> Any:
            return [np.eye(3, 4)[:1], np.eye(3, 4), np.eye(3, 4)[2:]]

    task = RetrievalTask(text("q"), text("a", "b", "c"), [{0: 1.0}])
    # Only the second document has both vectors of the query.
    assert evaluate_embedder(Embedder(), task)["mrr"] == 0.5
    by_label = RetrievalTask(task.corpus, task.corpus, [{1: 1.0}, {2: 1.0}, {1: 1.0}], exclude_self=True)
    # For the second, the first and the third are equally near.
    assert evaluate_embedder(Embedder(), by_label)["mrr"] == pytest.approx((1 + 0.5 + 1) / 3)


# Tasks from files


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    write(tmp_path / "corpus.jsonl", {"_id": "d1", "title": "A title", "text": "a text"}, {"_id": 2, "text": "b"})
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "d3", "text": "", "image": "a.png"}) + "\n")
    write(
        tmp_path / "queries.jsonl",
        {"_id": "q0", "text": "unused"},
        {"_id": "q1", "text": "one"},
        {"_id": "q2", "text": "two"},
    )
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td3\t2\nq1\td1\t1\nq1\t2\t0\n")
    return tmp_path


def write(file: Path, *rows: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_folder_in_the_layout_of_beir(beir: Path) -> None:
    task = task_from_folder(beir)
    assert list(task.queries) == text("one", "two")
    assert list(task.corpus) == [*text("A title a text", "b"), Item(images=((beir / "a.png").resolve(),))]
    assert [dict(r) for r in task.relevant] == [{0: 1.0}, {2: 2.0}]


def test_judgements_of_trec(beir: Path) -> None:
    (beir / "qrels.txt").write_text("q1 0 d1 1\n\nq2 0 d3 2\n")
    task = task_from_files(beir / "queries.jsonl", beir / "corpus.jsonl", beir / "qrels.txt")
    assert [dict(r) for r in task.relevant] == [{0: 1.0}, {2: 2.0}]


def test_judgements_end_with_their_line_whatever_characters_ids_hold(beir: Path) -> None:
    write(beir / "queries.jsonl", {"_id": "q\u2028 1\x0c", "text": "one"})
    (beir / "qrels.tsv").write_bytes("\ufeffquery-id\tcorpus-id\tscore\r\nq\u2028 1\x0c\td1\t1\r\n".encode())
    task = task_from_files(beir / "queries.jsonl", beir / "corpus.jsonl", beir / "qrels.tsv")
    assert [dict(r) for r in task.relevant] == [{0: 1.0}]


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("corpus.jsonl", "{not json", r"corpus.jsonl:4: not valid JSON"),
        ("corpus.jsonl", '{"text": "x"}', r"corpus.jsonl:4: has no '_id'"),
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "x"}',
            r"corpus.jsonl:4: the id 'd1' is also the id of .*corpus.jsonl:1",
        ),
        ("corpus.jsonl", '{"_id": "d4"}', r"corpus.jsonl:4: has neither 'text' nor 'image'"),
        ("corpus.jsonl", '{"_id": "d4", "title": 3, "text": "x"}', r"corpus.jsonl:4: 'title' must be a text"),
        ("corpus.jsonl", '{"_id": "d4", "image": "no.png"}', r"corpus.jsonl:4: 'image' is no.png, but there is no"),
        ("corpus.jsonl", '{"_id": "d4", "image": "../x.png"}', r"corpus.jsonl:4: .* outside"),
        ("queries.jsonl", '{"_id": "q9", "text": ""}', r"queries.jsonl:4: 'text' is an empty text"),
        ("qrels/test.tsv", "q7\td1\t1", r"test.tsv:5: .*queries.jsonl has no query 'q7'"),
        ("qrels/test.tsv", "q1\td1\t2", r"test.tsv:5: document 'd1' has two grades for query 'q1'"),
        ("qrels/test.tsv", "q1 Q0 d1 1 0.9 run", r"test.tsv:5: this is a line of results"),
        ("qrels/test.tsv", "q1\td3\tvery", r"test.tsv:5: the grade must be a finite number, but is 'very'"),
        ("qrels/test.tsv", "q1\td3\tnan", r"test.tsv:5: the grade must be a finite number"),
        ("qrels/test.tsv", "q1 d3", r"test.tsv:5: a judgement has 3 or 4 \(TREC\) columns, but this line has 2"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(beir: Path, file: str, line: str, message: str) -> None:
    with (beir / file).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=message):
        task_from_folder(beir)


def test_real_folders_are_read_as_beir_and_trec_eval_read_them(beir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An empty document, judged documents that are not there, and the same judgement twice."""
    with (beir / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "d4", "title": "", "text": ""}\n')
    with (beir / "qrels/test.tsv").open("a") as file:
        file.write("q1\td7\t2\nq1\td8\t0\nq1\td1\t1\nq2\td9\t1\n")
    task = task_from_folder(beir)
    assert task.corpus[3] == Item(text="")
    assert [dict(r) for r in task.relevant] == [{0: 1.0}, {2: 2.0}]
    assert task.missing == [[2.0], [1.0]]
    said = [record.getMessage() for record in caplog.records]
    assert [m.split(" ")[0] for m in said] == ["1", "2", "1"]
    assert "empty" in said[0]
    assert "count as not found" in said[1]
    assert "count once" in said[2]

    vectors = torch.eye(4)
    results = evaluate_retrieval(vectors[[0, 2]], vectors, task.relevant, missing=task.missing)
    qrels = {"q1": {"d1": 1, "d7": 2}, "q2": {"d3": 2, "d9": 1}}
    names = ["d1", "2", "d3", "d4"]
    scores = {"q1": vectors[0] @ vectors.T, "q2": vectors[2] @ vectors.T}
    run = {query: dict(zip(names, (row - torch.arange(4) * 1e-3).tolist())) for query, row in scores.items()}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recall_5", "map"}).evaluate(run)
    for ours, theirs in (("ndcg@10", "ndcg_cut_10"), ("recall@5", "recall_5"), ("map", "map")):
        assert results[ours] == pytest.approx(sum(q[theirs] for q in found.values()) / 2)


def test_a_query_of_which_all_relevant_documents_are_missing_counts_as_zero() -> None:
    vectors = torch.eye(3)
    results = evaluate_retrieval(vectors[:2], vectors, [{0: 1.0}, {}], missing=[[], [1.0, 3.0]])
    assert (results["num_queries"], results["recall@1"], results["ndcg@10"]) == (2, 0.5, 0.5)


def test_a_query_does_not_find_the_document_of_its_own_id(beir: Path) -> None:
    """Quora and ArguAna: queries are documents. BEIR and MTEB leave the document of the same id out."""
    write(beir / "corpus.jsonl", *({"_id": name, "text": name} for name in ("q1", "q2", "d1")))
    (beir / "qrels/test.tsv").write_text("q1\td1\t1\nq2\tq2\t1\n")
    task = task_from_folder(beir)
    assert task.excluded() == [0, -1]  # A document that is relevant can be found.
    vectors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.9, 0.0, 0.4]])
    results = evaluate_retrieval(vectors[:2], vectors, task.relevant, exclude=task.excluded())
    assert results["recall@1"] == 1.0


def test_rows_written_in_both_directions_do_not_find_themselves() -> None:
    rows = [Example(Item("a"), Item("c"), source="f:1"), Example(Item("c", instruction="i"), Item("a"), source="f:2")]
    task = task_from_examples(rows)
    assert [task.corpus[i] for i in task.excluded() or ()] == text("a", "c")
    vectors = {"a": torch.tensor([1.0, 0.0]), "c": torch.tensor([0.8, 0.6])}
    queries, corpus = ([vectors[str(item.text)] for item in items] for items in (task.queries, task.corpus))
    results = evaluate_retrieval(torch.stack(queries), torch.stack(corpus), task.relevant, exclude=task.excluded())
    assert results["recall@1"] == 1.0
    assert task_from_examples([Example(Item("a"), Item("a"), source="f:1")]).excluded() is None


def test_a_broken_grade_in_the_first_line_is_not_a_header(beir: Path) -> None:
    (beir / "qrels/test.tsv").write_text("q1 0 d1 nan\nq2 0 d3 1\n")
    with pytest.raises(DataError, match=r"test.tsv:1: the grade must be a finite number, but is 'nan'"):
        task_from_folder(beir)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_judgements_may_be_rows(beir: Path, kind: str) -> None:
    (beir / "qrels/test.tsv").unlink()
    rows = [{"query_id": "q2", "corpus-id": "d3", "score": 2}, {"query_id": "q1", "corpus-id": "d1", "score": 1}]
    file = beir / f"qrels.{kind}"
    if kind == "jsonl":
        write(file, *rows)
    elif kind == "csv":
        file.write_text("query_id,corpus-id,score\nq2,d3,2\nq1,d1,1\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    assert [dict(r) for r in task_from_folder(beir).relevant] == [{0: 1.0}, {2: 2.0}]


def test_rows_of_judgements_that_lack_a_column_are_named(beir: Path) -> None:
    write(beir / "qrels.jsonl", {"query-id": "q1", "corpus-id": "d1", "value": 1})
    with pytest.raises(DataError, match=r"qrels.jsonl:1: has no 'score'. Its columns are 'query-id'"):
        task_from_files(beir / "queries.jsonl", beir / "corpus.jsonl", beir / "qrels.jsonl")


def test_missing_and_empty_files_are_errors(beir: Path) -> None:
    (beir / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(DataError, match="has no judgements"):
        task_from_folder(beir)
    (beir / "qrels/test.tsv").write_bytes(b"q\td\t\xff1\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        task_from_folder(beir)
    with pytest.raises(DataError, match=r"dev.tsv does not exist"):
        task_from_folder(beir, "dev")
    with pytest.raises(DataError, match="is not a folder"):
        task_from_folder(beir / "nowhere")
    with pytest.raises(DataError, match="cannot be read"):
        task_from_files(beir / "queries.jsonl", beir / "corpus.jsonl", beir / "nowhere.tsv")


# Reports


def test_before_and_after_with_differences(tmp_path: Path) -> None:
    before, after = {"recall@1": 0.316, "num_queries": 500.0}, {"recall@1": 0.412, "mrr": 0.5, "num_queries": 500.0}
    table = format_results({"before": before, "after": after}, title="Held-out [queries]")
    assert "\x1b" not in table
    lines = [line.split() for line in table.splitlines()]
    assert ["metric", "before", "after", "difference"] in lines
    assert ["recall@1", "0.3160", "0.4120", "+0.0960"] in lines
    assert ["num_queries", "500", "500"] in lines
    assert ["mrr", "0.5000"] in lines
    assert "Held-out [queries]" in table
    stream = io.StringIO()
    print_results({"only": before}, console=Console(file=stream))
    assert "difference" not in stream.getvalue()
    write_results(tmp_path / "r.json", {"before": before, "after": after}, model="m")
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "model": "m",
        "metrics": {"before": before, "after": after},
    }


def test_metrics_and_search_need_torch_only() -> None:
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq2", "transformers", "rich", "pyarrow", "PIL"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from vembed_fs2.evaluation import evaluate_retrieval, exact_search, ndcg_at_k
import torch
x = torch.eye(4)
assert evaluate_retrieval(x, x, [{i} for i in range(4)])["recall@1"] == 1.0
"""
    subprocess.run([sys.executable, "-c", code], check=True)

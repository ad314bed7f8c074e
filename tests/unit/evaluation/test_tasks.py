"""Which files hold a task, compressed ones, missing images, and documents with the same score."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytrec_eval
import torch

from vembed_fs2.errors import ConfigError, DataError
from vembed_fs2.evaluation.datasets import find_task, task_from_files, task_from_folder
from vembed_fs2.evaluation.retrieval import evaluate_retrieval
from vembed_fs2.evaluation.task import RetrievalTask

# As trec_eval compares them, byte by byte: "é" is after "z", and "d10" before "d2".
IDS = ["d2", "d10", "é", "Z", "z", "d1", "a-long-one", "7", "𝄞"]


def write(folder: Path, grades: dict[str, dict[str, int]], suffix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    files = {
        "queries.jsonl": "".join(json.dumps({"_id": q, "text": f"query {q}"}) + "\n" for q in grades),
        "corpus.jsonl": "".join(json.dumps({"_id": d, "text": f"document {d}"}) + "\n" for d in IDS),
        "qrels.tsv": "".join(f"{q}\t{d}\t{g}\n" for q, own in grades.items() for d, g in own.items()),
    }
    for name, text in files.items():
        data = text.encode("utf-8")
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return folder


GRADES = {"q1": {"d2": 1, "Z": 2}, "q2": {"é": 1}, "q3": {"d1": 3, "7": 1, "z": 1}}


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ties_are_ranked_as_trec_eval_does(tmp_path: Path, levels: int) -> None:
    torch.manual_seed(levels)
    scores = torch.randint(0, levels, (len(GRADES), len(IDS))).float()
    folder = write(tmp_path / "beir", GRADES)

    def ours(task: RetrievalTask) -> dict[str, float]:
        # Scores as dot products: each document is a column of the scores.
        position = {f"document {d}": column for column, d in enumerate(IDS)}
        columns = [position[item.text or ""] for item in task.corpus]
        return evaluate_retrieval(
            torch.eye(len(GRADES)), scores[:, columns].T, task.relevant, similarity="dot", ks=[1, 3]
        )

    run = {q: dict(zip(IDS, row)) for q, row in zip(GRADES, scores.tolist())}
    measures = {"recip_rank", "map", "ndcg_cut.10", "recall.1,3", "success.1,3"}
    per_query = pytrec_eval.RelevanceEvaluator(GRADES, measures).evaluate(run).values()
    theirs = {name: sum(q[name] for q in per_query) / len(GRADES) for name in next(iter(per_query))}

    names = {"mrr": "recip_rank", "map": "map", "ndcg@10": "ndcg_cut_10"}
    names |= {
        f"{ours}@{k}": f"{other}_{k}" for ours, other in (("recall", "recall"), ("hit", "success")) for k in (1, 3)
    }
    results = ours(task_from_folder(folder, ties="trec_eval"))
    assert {n: pytest.approx(theirs[other], abs=1e-6) for n, other in names.items()} == {n: results[n] for n in names}

    if levels == 1:
        assert ours(task_from_folder(folder))["mrr"] != pytest.approx(results["mrr"])


def test_the_order_of_ties_leaves_the_task_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "beir", {**GRADES, "d1": {"d2": 1}})
    corpus, sorted_ = task_from_folder(folder), task_from_folder(folder, ties="trec_eval")
    assert [d.text for d in sorted_.corpus[:3]] == ["document 𝄞", "document é", "document z"]

    def named(task: RetrievalTask) -> list[object]:
        texts = [item.text for item in task.corpus]
        excluded = [texts[d] if d >= 0 else None for d in task.exclude]
        return [{texts[d]: g for d, g in own.items()} for own in task.relevant] + excluded

    assert named(corpus) == named(sorted_)
    with pytest.raises(ConfigError, match="`ties` must be one of corpus, trec_eval, but is 'trec'"):
        task_from_folder(folder, ties="trec")


def test_a_folder_of_compressed_files_is_the_same_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    plain, packed = write(tmp_path / "plain", GRADES), write(tmp_path / "packed", GRADES, ".gz")
    assert task_from_folder(packed) == task_from_folder(plain) == task_from_folder("~/packed") == find_task([packed])
    files = [packed / f"{name}.gz" for name in ("queries.jsonl", "corpus.jsonl", "qrels.tsv")]
    assert task_from_files(*files) == task_from_folder(plain)

    (packed / "corpus.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"corpus.jsonl does not exist \(nor .*, nor one of them with .gz or .zst\)"):
        task_from_folder(packed)


def test_what_is_no_task_is_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "beir", GRADES)
    queries, corpus, qrels = (folder / name for name in ("queries.jsonl", "corpus.jsonl", "qrels.tsv"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "positive": "p"}\n')
    other = tmp_path / "shards"
    other.mkdir()

    assert find_task([rows]) is None
    assert find_task([other]) is None
    assert find_task([], (queries, corpus, qrels)) == find_task([folder]) == task_from_folder(folder)

    for paths, files in (([], (None, None, None)), ([rows], (queries, corpus, qrels)), ([], (queries, None, qrels))):
        with pytest.raises(DataError, match="one folder with queries, corpus and qrels, or these three files"):
            find_task(paths, files)
    with pytest.raises(DataError, match=r"beir holds a task .* must be the only one"):
        find_task([folder, rows])
    with pytest.raises(ConfigError, match="`ties` needs the ids of documents, which files of rows do not have"):
        find_task([rows], ties="trec_eval")
    with pytest.raises(ConfigError, match="`columns`: only for files of rows"):
        find_task([folder], row_options={"columns": True, "mode": False})


def test_an_image_of_nulls_in_a_corpus_is_a_missing_value(tmp_path: Path) -> None:
    folder = write(tmp_path / "beir", {"q1": {"d": 1}})
    none = {"bytes": None, "path": None}
    rows = [{"_id": "d", "text": "a text", "image": none}, {"_id": "e", "text": "", "image": none}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "corpus.parquet")
    (folder / "corpus.jsonl").unlink()
    task = task_from_folder(folder)
    assert [(item.text, item.images) for item in task.corpus] == [("a text", ()), ("", ())]

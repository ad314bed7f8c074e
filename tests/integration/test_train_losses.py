"""Training with each way to put objectives together, with a teacher, and with what they need of the data."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.command_line import assert_same_weights, metrics, run, run_all, weights
from tests.integration.conftest import WORDS
from vembed_fs2 import Embedder
from vembed_fs2.embedding.learned import teacher_projection
from vembed_fs2.losses import LOSSES


@pytest.fixture(scope="module")
def teacher(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a BERT with larger embeddings, and prompts of its own."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "teacher"
    BertTokenizerFast.from_pretrained(bert_folder).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        BertModel(BertConfig.from_pretrained(bert_folder, hidden_size=48)).save_pretrained(folder)
    prompts = {"prompts": {"query": "red ", "document": "blue "}}
    folder.joinpath("vembed_processor.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 83 rows with none to three negatives and with scores: the fraction of words in common."""
    draw = random.Random(1)
    rows = []
    for i in range(83):
        words = draw.sample(WORDS, 4)
        documents = [draw.sample(words, 3), *(draw.sample(WORDS, 3) for _ in range(i % 4))]
        texts = [" ".join(d) for d in documents]
        scores = [len(set(d) & set(words)) / 3 for d in documents]
        rows.append({"query": " ".join(words), "positive": texts[0], "negatives": texts[1:], "scores": scores})
    file = tmp_path_factory.mktemp("scored") / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(folder: Path, model: Path, data: Path, loss: Any, *more: str) -> list[str]:
    config = folder.with_suffix(".yaml")
    config.write_text(json.dumps({"loss": loss}))  # JSON is YAML.
    return [
        "train", str(folder), "--no-rich", "--config-file", str(config), "--config",
        f"model.path={model}", f"dataset.paths=[{data}]", "dataset.batch_size=8", "regime.num_steps=6",
        "regime.publish_metrics_every_n_steps=1", "optimizer.config.lr=0.005", "lr_scheduler.config.warmup_steps=0",
        "lr_scheduler.config.decay=constant", "trainer.mixed_precision.mode=off", "grad_cache.chunk_tokens=48", *more,
    ]  # fmt: skip


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_dir.joinpath("metrics", "train.jsonl").read_text().splitlines()]


BOTH = [
    {"name": "infonce", "config": {"temperature": 0.1, "learn_temperature": True}},
    {"name": "distillation", "weight": 0.5},
    {"name": "spread", "weight": 0.1},
]


def test_objectives_of_objectives_train(tmp_path: Path, bert_folder: Path, teacher: Path, scored: Path) -> None:
    """Matryoshka of a combination, a combination with Matryoshka, scores of the data, and two kinds of teachers."""
    source = f"teacher.path={teacher}"
    nested = {
        "name": "matryoshka",
        "config": {"dims": [8, 32], "loss": {"name": "combined", "config": {"losses": BOTH}}},
    }
    runs: dict[str, tuple[Any, ...]] = {
        "nested": (nested,),
        "margins": ({"name": "distillation", "config": {"kind": "margin_mse"}},),
        "teacher": ({"name": "distillation", "config": {"source": "teacher"}}, source),
        "embeddings": ({"name": "embedding_distillation", "config": {"kind": "mse"}}, source),
        "filter": (
            {"name": "infonce", "config": {"false_negatives": "filter_by_teacher"}},
            source,
            "teacher.dtype=bfloat16",
        ),
        "sigmoid": ({"name": "sigmoid", "config": {"bias": -3.0}},),
        "same size": ({"name": "embedding_distillation"}, f"teacher.path={bert_folder}"),
    }
    results = run_all(
        [arguments(tmp_path / name, bert_folder, scored, loss, *more) for name, (loss, *more) in runs.items()]
    )

    assert [r.status for r in results] == [0] * len(runs), "\n".join(r.output[-3000:] for r in results)
    losses = {name: [row["Loss"] for row in recorded(tmp_path / name)] for name in runs}
    for name in ("nested", "margins", "teacher", "embeddings", "sigmoid"):
        assert sum(losses[name][-2:]) < sum(losses[name][:2]), name
    row = recorded(tmp_path / "nested")[-1]
    # Means over queries, of the largest size and for each.
    assert 0.0 < row["distillation/agreement"] <= 1.0
    assert row["loss@8"] + row["loss@32"] == pytest.approx(row["Loss"], rel=1e-5)
    assert row["Negatives per Query"] > 7
    assert "Masked Candidates (%)" in row
    assert -1.0 <= recorded(tmp_path / "embeddings")[-1]["teacher_cosine"] <= 1.0

    # The temperature, the bias and the projection are parameters, and trained.
    for name, key, initial in (
        ("nested", "logit_scale", 2.302585), ("sigmoid", "logit_scale", 2.302585), ("sigmoid", "logit_bias", -3.0)
    ):  # fmt: skip
        assert abs(float(weights(tmp_path / name)[key]) - initial) > 1e-3, (name, key)
    assert recorded(tmp_path / "sigmoid")[-1]["bias"] != recorded(tmp_path / "sigmoid")[0]["bias"]
    projection = weights(tmp_path / "embeddings")["teacher_projection"]
    assert projection.shape == (48, 32)
    assert not torch.equal(projection, teacher_projection(48, 32).initial())  # Trained.
    assert "teacher_projection" not in weights(tmp_path / "teacher")
    assert "teacher_projection" not in weights(tmp_path / "same size")


def test_a_distilled_model_is_exported_without_its_projection_and_trained_on(
    tmp_path: Path, bert_folder: Path, teacher: Path, scored: Path
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    distil, source = {"name": "embedding_distillation"}, f"teacher.path={teacher}"
    results = run_all(
        [
            arguments(first, bert_folder, scored, distil, source),
            arguments(second, first, scored, distil, source, "optimizer.config.lr=1e-12"),
            arguments(third, first, scored, {"name": "infonce"}),
        ]
    )

    assert [r.status for r in results] == [0] * 3, "\n".join(r.output[-3000:] for r in results)
    # The projection goes on being trained where it is needed, and is gone where it is not.
    torch.testing.assert_close(weights(second)["teacher_projection"], weights(first)["teacher_projection"])
    assert "teacher_projection" not in weights(third)

    out = tmp_path / "exported"
    Embedder.load(first).save_hf(out)
    plain, exported = Embedder.load(bert_folder), Embedder.load(out)
    assert exported.model.state_dict().keys() == plain.model.state_dict().keys()
    texts = ["red green", "old"]
    torch.testing.assert_close(torch.tensor(Embedder.load(first).encode(texts)), torch.tensor(exported.encode(texts)))


@pytest.mark.parametrize("parallelism", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_learn_from_a_teacher_what_one_does(
    parallelism: str, tmp_path: Path, bert_folder: Path, teacher: Path, scored: Path
) -> None:
    losses = [{"name": "distillation", "config": {"source": "teacher"}}, {"name": "embedding_distillation"}]
    loss = {"name": "combined", "config": {"losses": losses}}
    more = [f"teacher.path={teacher}", "model.config_overrides.dropout_p=0", "model.config_overrides.attn_dropout_p=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*arguments(one, bert_folder, scored, loss, *more)).expect(0)
    more += ["dataset.batch_size=4", f"trainer.data_parallelism={parallelism}"]
    run(*arguments(two, bert_folder, scored, loss, *more), num_processes=2).expect(0)

    for name in ("Loss", "agreement", "embedding_distillation/teacher_cosine"):
        assert list(metrics(two, name).values()) == pytest.approx(list(metrics(one, name).values()), rel=1e-3), name
    state, other = Embedder.load(one).model.state_dict(), Embedder.load(two).model.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=2e-4)


def test_a_run_with_a_teacher_resumes_exactly(tmp_path: Path, bert_folder: Path, teacher: Path, scored: Path) -> None:
    def command(folder: Path, num_steps: int) -> list[str]:
        more = [f"teacher.path={teacher}", "regime.checkpoint_every_n_steps=2", f"regime.num_steps={num_steps}"]
        loss = {"name": "matryoshka", "config": {"dims": [8, 32], "loss": {"name": "embedding_distillation"}}}
        return arguments(folder, bert_folder, scored, loss, *more)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    results = run_all([command(whole, 8), command(stopped, 4), command(stopped, 8)])

    assert [r.status for r in results] == [0] * 3, "\n".join(r.output[-3000:] for r in results)
    for name in ("Loss", "loss@8", "teacher_cosine"):
        assert metrics(stopped, name) == metrics(whole, name)
    assert_same_weights(whole, stopped)
    assert weights(whole)["teacher_projection"].shape == (48, 32)


def test_errors_say_what_is_missing(
    tmp_path: Path, bert_folder: Path, teacher: Path, texts: Path, scored: Path
) -> None:
    source = f"teacher.path={teacher}"
    cases: dict[str, tuple[Any, list[str], list[str]]] = {
        "no teacher": (
            {"name": "embedding_distillation"}, [], ["`loss` needs a teacher", "`teacher.name`", "`teacher.path`"]
        ),
        "needless teacher": ({"name": "infonce"}, [source], ["`teacher` is given, but `loss` needs none"]),
        "no such teacher": (
            {"name": "embedding_distillation"}, [f"teacher.path={tmp_path}/nosuch"], [f"{tmp_path}/nosuch does not"]
        ),
        "two teachers": (
            {"name": "embedding_distillation"}, [source, "teacher.name=x"], ["`name` and `path` must not be"]
        ),
        "no scores": (
            {"name": "distillation"}, [f"dataset.paths=[{texts}]"],
            ["83 of 83 rows cannot be used", f"{texts}:1: the row has no `scores`", "and 73 more"],
        ),
        "no negatives": (
            {"name": "distillation"}, [f"dataset.paths=[{positives_only(scored, tmp_path)}]"],
            ["no row has `negatives`"],
        ),
        "dims": (
            {"name": "matryoshka", "config": {"dims": [8, 64, 32]}}, [],
            ["`dims` holds 64, but embeddings have only 32 dimensions"],
        ),
        "temperatures": (
            {"name": "combined", "config": {"losses": [
                {"name": "infonce", "config": {"temperature": t, "learn_temperature": True}} for t in (0.1, 0.2)
            ]}}, [],
            ["share the model's learned `logit_scale`", "2.30259", "1.60944"],
        ),
        "nested": (
            {"name": "matryoshka", "config": {"loss": {"name": "infonce", "config": {"temprature": 1}}}}, [],
            ["`loss.config.loss.config.temprature`", "`loss.config.loss.config.temperature`"],
        ),
    }  # fmt: skip
    results = run_all(
        [arguments(tmp_path / n, bert_folder, scored, loss, *more) for n, (loss, more, _) in cases.items()]
    )
    for (name, (_, _, expected)), result in zip(cases.items(), results):
        assert result.status == 2, f"{name}: {result.output[-2000:]}"
        assert "Traceback" not in result.output
        for text in expected:
            assert text in result.output[result.output.find("error: ") :], f"{name}: {result.output[-2000:]}"


def positives_only(scored: Path, folder: Path) -> Path:
    rows = [json.loads(line) for line in scored.read_text().splitlines()]
    file = folder / "positives.jsonl"
    file.write_text("".join(json.dumps({**row, "negatives": [], "scores": row["scores"][:1]}) + "\n" for row in rows))
    return file


def test_rows_without_scores_are_left_out_if_asked(tmp_path: Path, bert_folder: Path, scored: Path) -> None:
    rows = [json.loads(line) for line in scored.read_text().splitlines()]
    for row in rows[:5]:
        del row["scores"]
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    more = ("dataset.on_error=skip", "dataset.drop_last=false", "regime.num_data_epochs=1", "regime.num_steps=100")

    result = run(*arguments(out, bert_folder, file, {"name": "distillation"}, *more)).expect(0)

    assert recorded(out)[-1]["Total Number of Queries"] == 78
    assert "5 of 83 rows cannot be used:" in result.output
    assert f"{file}:1: the row has no `scores`" in result.output
    assert "They are left out." in result.output


GUIDE = Path(__file__).parents[2].joinpath("docs", "losses.md").read_text(encoding="utf-8")


def guide_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


def test_every_configuration_of_the_guide_trains(
    tmp_path: Path, bert_folder: Path, teacher: Path, scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("teachers").mkdir()
    tmp_path.joinpath("teachers", "large").symlink_to(teacher)
    commands = []
    for number, block in enumerate(guide_blocks("yaml")):
        tmp_path.joinpath(f"{number}.yaml").write_text(block)
        command = arguments(tmp_path / f"run{number}", bert_folder, scored, {}, "regime.num_steps=2")
        command[command.index("--config-file") + 1] = f"{number}.yaml"
        commands.append(command)
    assert commands
    assert [result.status for result in run_all(commands)] == [0] * len(commands)


def test_the_guide_names_every_objective() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE))
    assert named == set(LOSSES)


def test_an_objective_of_another_package_trains_as_the_guide_says(
    tmp_path: Path, bert_folder: Path, scored: Path
) -> None:
    _, used, own, _ = guide_blocks("python")
    names: dict[str, Any] = {}
    exec(used, names)
    assert names["query"].grad is not None

    site = tmp_path / "site"
    info = site / "my_losses-1.dist-info"
    info.mkdir(parents=True)
    site.joinpath("my_losses.py").write_text(own)
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: my_losses\nVersion: 1\n")
    group, point = re.fullmatch(r"\[project.entry-points.\"(.*)\"\]\n(.*)\n", guide_blocks("toml")[0]).groups()  # type: ignore[union-attr]
    info.joinpath("entry_points.txt").write_text(f"[{group}]\n{point.replace(chr(34), '')}\n")
    inner = {"name": "squared_hinge", "config": {"margin": 0.3}}
    out = tmp_path / "run"
    command = arguments(out, bert_folder, scored, {"name": "matryoshka", "config": {"dims": [8, 32], "loss": inner}})

    run(*command, PYTHONPATH=str(site)).expect(0)

    rows = recorded(out)
    assert rows[-1]["margin"] == pytest.approx(0.3)
    assert rows[-1]["Loss"] < rows[0]["Loss"]
    misspelt = run(*command, "loss.config.loss.name=squared_hing", PYTHONPATH=str(site)).expect(2)
    assert "`loss.config.loss.name` 'squared_hing' is not known. Did you mean 'squared_hinge'?" in misspelt.output

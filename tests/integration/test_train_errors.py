"""What a user gets wrong is said in one message, and does not block the corrected command."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file

from tests.integration.command_line import Result, run, run_all, steps


class Case:
    """A command that is wrong, and what must be said about it."""

    def __init__(self, config: list[str], *expected: str, arguments: list[str] | None = None) -> None:
        self.config = config
        self.expected = expected
        self.arguments = arguments or []


def config_cases(folder: Path) -> dict[str, Case]:
    broken = folder / "broken.yaml"
    broken.write_text("model: {path: [\n")
    no_mapping = folder / "list.yaml"
    no_mapping.write_text("- 1\n")
    misspelt = folder / "misspelt.yaml"
    misspelt.write_text("trainer:\n  max_gradnorm: 1.0\n")
    return {
        "preset": Case([], "--preset", "'nosuch' is not a preset", arguments=["--preset", "nosuch"]),
        "key": Case(["regime.num_step=5"], "`regime.num_step` is not a known key", "`regime.num_steps`?"),
        "section": Case(["optimiser.config.lr=1"], "`optimiser` is not a known key", "`optimizer`?"),
        "elsewhere": Case(["batch_size=8"], "`batch_size` is not a known key", "`dataset.batch_size`?"),
        "component key": Case(["optimizer.config.learning_rate=1"], "`optimizer.config.learning_rate` is not a known"),
        "all at once": Case(
            ["regime.num_steps=abc", "dataset.batch_size=1.5", "trainer.max_grad_norm=true", "los.name=x"],
            "`regime.num_steps` must be a whole number or null, but is 'abc'",
            "`dataset.batch_size` must be a whole number, but is 1.5",
            "`trainer.max_grad_norm` must be a number or null, but is True",
            "`los` is not a known key",
        ),
        "range": Case(["dataset.batch_size=0", "regime.num_steps=0"], "`dataset`: `batch", "`regime`: `num_steps`"),
        "key and range": Case(
            ["datset.batch_size=8", "regime.num_steps=-1", "model.dtype=x", "gang.timeout=0"],
            "`datset` is not a known key", "`regime`: `num_steps` must", "`model.dtype` must be", "`gang`: `timeout`",
        ),
        "zero": Case(
            ["regime.publish_metrics_every_n_steps=0", "regime.validate_every_n_steps=-2"],
            "`regime`: `publish_metrics_every_n_steps` must be", "`regime`: `validate_every_n_steps` must be",
        ),
        "export": Case(["regime.export_hugging_face=true"], "`fairseq2 vembed export OUTPUT_DIR FOLDER` writes"),
        "mode": Case(["dataset.mode=x2y"], "`dataset.mode` must be one of", "'t2i'", "x2y"),
        "loss": Case(["loss.name=infonse"], "`loss.name` 'infonse' is not known", "'infonce'?"),
        "optimizer": Case(["optimizer.name=adamm"], "`optimizer.name` 'adamm' is not known", "Did you mean 'adamw'?"),
        "schedule": Case(["lr_scheduler.name=warmup"], "`lr_scheduler.name` 'warmup' is not known", "Did you mean"),
        "score": Case(["regime.score_metric=mrr"], "`regime.score_metric` needs held-out data"),
        "score name": Case(["regime.score_metric=loss"], "`regime.score_metric` must be one of recall@1, ", "'loss'"),
        "clipping": Case(["trainer.max_grad_norm=-1"], "`trainer.max_grad_norm` must be positive, but is -1.0"),
        "optimizer value": Case(["optimizer.config.betas=[0.9,1.5]"], "`optimizer.config`: `betas` must be at least 0"),
        "validation": Case(["regime.validate_at_start=true"], "`regime.validate_at_start` needs held-out data"),
        "no equals sign": Case(["regime.num_steps"], "--config", "'regime.num_steps' must have the form KEY=VALUE"),
        "string for a list": Case(["dataset.paths=train.jsonl"], "`dataset.paths` must be a list", "[train.jsonl]"),
        "seed": Case(["common.seed=-1"], "`common.seed` must be between 0 and 2**32 - 1"),
        "value": Case(["dataset.paths=[a"], "'dataset.paths=[a' is not valid YAML"),
        "YAML": Case([], str(broken), "not valid YAML", arguments=["--config-file", str(broken)]),
        "YAML list": Case([], str(no_mapping), "keys and values", arguments=["--config-file", str(no_mapping)]),
        "file key": Case([], "`trainer.max_gradnorm`", "max_grad_norm", arguments=["--config-file", str(misspelt)]),
        "no file": Case([], "nosuch.yaml", "cannot be read", arguments=["--config-file", str(folder / "nosuch.yaml")]),
        "processes": Case([], "--nproc-per-node must be at least 1", arguments=["--nproc-per-node", "0"]),
    }  # fmt: skip


def model_cases(folder: Path, bert: Path) -> dict[str, Case]:
    def changed(name: str, change: Callable[[Path], None]) -> list[str]:
        copy = folder / name
        shutil.copytree(bert, copy)
        change(copy)
        return [f"model.path={copy}"]

    def set_type(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        path.joinpath("config.json").write_text(json.dumps({**config, "model_type": "bertt"}))

    def change_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            tensors = load_file(path / "model.safetensors")
            change(tensors)
            save_file(tensors, path / "model.safetensors", {"format": "pt"})

        return apply

    added = "encoder.extra.weight"
    layer, words = "encoder.layer.1.output.dense.weight", "embeddings.word_embeddings.weight"
    return {
        "no model": Case(["model.path=null"], "`name`, `path` or `family` must be specified"),
        "card": Case(["model.path=null", "model.name=bge_smal_en_v15"], "bge_smal_en_v15", "baai_bge_small_en_v15"),
        "family": Case(["model.path=null", "model.family=vembed_bart"], "`model.family`", "'vembed_bert'?"),
        "arch": Case(["model.path=null", "model.family=vembed_bert", "model.arch=bas"], "`model.arch` 'bas' is not"),
        "no processor": Case(
            ["model.path=null", "model.family=vembed_clip", "regime.num_steps=-1", "dataset.batch_size=0"],
            "`processor.path` must name a folder with a tokenizer or image processor, because new weights",
            "`fairseq2 vembed export CARD FOLDER --format hf` writes one.", "`num_steps`", "`batch_size`",
        ),
        "no image processor": Case(
            ["model.path=null", "model.family=vembed_clip", f"processor.path={bert}"],
            f"`processor.path`: {bert} has no image processor", "CARD FOLDER",
        ),
        "folder": Case([f"model.path={folder}/nosuch"], f"{folder}/nosuch does not exist"),
        "no weights": Case(changed("bare", lambda p: (p / "model.safetensors").unlink()), "bare has no weights"),
        "truncated weights": Case(
            changed("cut", lambda p: (p / "model.safetensors").write_bytes(b"\x10" * 99)), "cut/model.safetensors"
        ),
        "model_type": Case(changed("type", set_type), "model_type 'bertt' is not supported", "Did you mean 'bert'?"),
        "missing tensor": Case(
            changed("missing", change_tensors(lambda t: t.pop(layer))),
            "missing", "encoder.layers.1.ffn.output_proj.weight",
        ),
        "extra tensor": Case(
            changed("extra", change_tensors(lambda t: t.update({added: t[words].clone()}))),
            "extra", added,
        ),
        "shape": Case(
            changed("shape", change_tensors(lambda t: t.update({words: t[words][:3].clone()}))),
            "`frontend.embed.weight` has a shape of (3, 32)",
        ),
        "overrides": Case(["model.config_overrides.num_layer=1"], "`model.config_overrides.num_layer`", "num_layers"),
    }  # fmt: skip


def data_cases(folder: Path) -> dict[str, Case]:
    def file(name: str, *lines: str) -> str:
        folder.joinpath(name).write_text("".join(line + "\n" for line in lines))
        return f"dataset.paths=[{folder / name}]"

    row = '{"query": "red", "positive": "red hat"}'
    folder.joinpath("label.jsonl").write_text('{"query": "red", "label": "a"}\n')
    Image.new("RGB", (8, 8)).save(folder / "red.png")
    picture = '{"query": "red", "positive_image": "red.png"}'
    return {
        "no paths": Case(["dataset.paths=[]"], "`dataset`: `paths` must name at least one file"),
        "missing file": Case([f"dataset.paths=[{folder}/nosuch.jsonl]"], "nosuch.jsonl does not exist"),
        "empty": Case([file("empty.jsonl")], "empty.jsonl has no rows"),
        "not JSON": Case([file("broken.jsonl", row, row[:-1], row)], "broken.jsonl:2", "not valid JSON"),
        "empty query": Case(
            [file("blank.jsonl", row, row, row.replace('"red"', '"  "'))], "blank.jsonl:3", "query", "empty"
        ),
        "two rows": Case([file("two.jsonl", "1", row, "[]")], "two.jsonl:1", "two.jsonl:3", "2 of 3 rows"),
        "no positive": Case([file("half.jsonl", '{"query": "red"}')], "half.jsonl:1", "positive"),
        "column": Case([file("column.jsonl", row), "dataset.columns.query=qery"], "'qery'", "Did you mean 'query'?"),
        "wrong mode": Case([file("mode.jsonl", row), "dataset.mode=t2i"], "mode.jsonl:1", "in mode t2i"),
        "image": Case(
            [file("image.jsonl", row, picture)], "image.jsonl:2: the row has an image, but the model reads none"
        ),
        "held-out image": Case(
            ["valid." + file("held_out.jsonl", picture).partition(".")[2]], "held_out.jsonl:1: the row has an image"
        ),
        "label only": Case([f"dataset.paths=[{folder / 'label.jsonl'}]"], "No label is that of two rows"),
        "label for pairs": Case(
            [f"dataset.paths=[{folder / 'label.jsonl'}]", "loss.name=cosent"],
            "label.jsonl:1: the row has no positive to train on, and the objective does not learn from labels",
        ),
        "held-out labels": Case(
            ["valid.paths=[{}]".format(folder / "label.jsonl")], "No query has a relevant document"
        ),
        "both files": Case(
            [f"dataset.paths=[{folder}/no.jsonl]", f"valid.paths=[{folder}/nor.jsonl]"],
            "no.jsonl does",
            "nor.jsonl does",
        ),
        "held-out file": Case([f"valid.paths=[{folder}/nosuch.jsonl]"], "nosuch.jsonl does not exist"),
        "batch": Case(["dataset.batch_size=100"], "100 rows", "83"),
        "batches": Case(["trainer.grad_accumulation.num_batches=11"], "88 rows", "8 rows", "11 batches", "83"),
    }


def test_errors_say_what_is_wrong(tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    cases = {**config_cases(tmp_path), **model_cases(tmp_path, bert_folder), **data_cases(tmp_path)}
    valid = ["regime.num_steps=1", f"dataset.paths=[{texts}]", "dataset.batch_size=8", f"model.path={bert_folder}"]
    out = tmp_path / "out"
    commands = [
        ["train", str(out), "--no-rich", *case.arguments, "--config", *valid, *case.config] for case in cases.values()
    ]
    commands.append(["train", str(out), "--no-rich", "--config", *valid])

    *failed, corrected = run_all(commands)

    problems = [problem for (name, case), result in zip(cases.items(), failed) for problem in check(name, case, result)]
    assert not problems, "\n\n".join(problems)
    assert corrected.status == 0, corrected.output[-4000:]  # In the folder that the failed ones were given.


def test_a_missing_login_is_said_before_anything_is_written(tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    """And with what else is wrong; not if the metrics are kept on this machine."""
    no_login = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": ""}
    config = ["common.metric_recorders.wandb.enabled=true", f"dataset.paths=[{texts}]", "dataset.batch_size=8"]

    def command(model: Path | str) -> list[object]:
        return ["train", tmp_path / "out", "--no-rich", "--config", *config, f"model.path={model}"]

    refused = run(*command(bert_folder), **no_login).expect(2)
    assert refused.output == (
        "error: The configuration is not valid:\n"
        "  - Weights & Biases has no login on this machine. Run `wandb login`, set WANDB_MODE=offline, or leave "
        "`common.metric_recorders.wandb.enabled` out to do without it.\n"
    )
    both = run(*command("nosuch"), **no_login).expect(2)
    assert both.output == refused.output + "  - nosuch is neither a folder nor the name of a card.\n"
    assert not tmp_path.joinpath("out").exists()
    offline = run(*command("nosuch"), **no_login, WANDB_MODE="offline").expect(2)
    assert offline.output == "error: nosuch is neither a folder nor the name of a card.\n"


def check(name: str, case: Case, result: Result) -> list[str]:
    errors = result.output[result.output.find("error: ") :]
    problems = [f"does not say {text!r}" for text in case.expected if text not in errors]
    if result.status != 2:
        problems.append(f"status {result.status}")
    if "Traceback" in result.output or not result.output.startswith("error: "):
        problems.append("no clean error, or something before it")
    return [f"{name}: {'; '.join(problems)}\n{result.output[-1500:]}"] if problems else []


def test_evaluate_says_what_is_wrong(tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    cases = {
        "no folder": Case([], "there is no folder", arguments=["--output", str(tmp_path / "no/results.json")]),
        "folder": Case([], f"{tmp_path} is a folder", arguments=["--output", str(tmp_path)]),
        "k": Case([], "argument --ks: must be a whole number of at least 1, but is '0'", arguments=["--ks", "0"]),
        "length": Case([], "`max_length` must be greater than or equal to 3", arguments=["--max-length", "0"]),
        "device": Case([], "The device 'cudaa' cannot be used", arguments=["--device", "cudaa"]),
    }

    results = run_all([["evaluate", str(bert_folder), str(texts), *case.arguments] for case in cases.values()])

    for (name, case), result in zip(cases.items(), results):
        assert result.status == 2, (name, result.output)
        assert "error: " in result.output, name
        assert case.expected[0] in result.output, name
        assert "Traceback" not in result.output, name
        assert "recall@" not in result.output, name


def test_a_broken_held_out_image_is_said_before_anything_is_trained(
    tmp_path: Path, clip_folder: Path, digits: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    rows = [json.loads(line) for line in data.joinpath("held_out.jsonl").read_text().splitlines()[:60]]
    image = data / rows[40]["positive_image"]
    image.write_bytes(image.read_bytes()[:-40])
    data.joinpath("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(out: Path, *config: str) -> list[str]:
        model = [f"model.path={clip_folder}", f"dataset.paths=[{data}/train.jsonl]", "dataset.max_rows=64"]
        valid = [f"valid.paths=[{data}/held_out.jsonl]", "dataset.batch_size=8", "regime.num_steps=2"]
        return ["train", str(out), "--no-rich", "--config", *model, *valid, *config]

    failed, skipped = run_all([command(tmp_path / "out"), command(tmp_path / "skip", "valid.on_error=skip")])

    assert failed.status == 2, failed.output[-3000:]
    assert f"such as: {data}/held_out.jsonl:41: {image} is truncated" in failed.output
    assert not tmp_path.joinpath("out").exists()
    assert skipped.status == 0, skipped.output[-3000:]
    assert f"A held-out row is left out: {data}/held_out.jsonl:41: {image} is truncated" in skipped.output


def test_a_training_that_diverges_is_an_error_and_no_checkpoint(tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    data = [f"model.path={bert_folder}", f"dataset.paths=[{texts}]", "dataset.batch_size=8", "regime.num_steps=4"]
    options = ["regime.publish_metrics_every_n_steps=1", "optimizer.config.lr=1e30"]
    (result,) = run_all([["train", str(tmp_path / "out"), "--no-rich", "--config", *data, *options]])
    assert result.status == 2, result.output[-3000:]
    assert "error: The loss is nan: the training has diverged." in result.output
    assert "Traceback" not in result.output
    assert steps(tmp_path / "out") == []


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    """Four steps an epoch with a checkpoint, and the first report after ten."""

    def command(name: str, *config: str) -> list[str]:
        data = [f"model.path={bert_folder}", f"dataset.paths=[{texts}]", "dataset.batch_size=8", "dataset.max_rows=32"]
        regime = ["regime.num_data_epochs=3", "regime.keep_last_n_checkpoints=1", "trainer.max_grad_norm=null"]
        return ["train", str(tmp_path / name), "--no-rich", "--config", *data, *regime, *config]

    hot = ["optimizer.config.lr=1e30", "lr_scheduler.config.decay=constant"]
    bf16 = ["trainer.mixed_precision.mode=auto", "trainer.mixed_precision.dtype=bfloat16"]
    cold = [
        "trainer.mixed_precision.mode=off",
        "lr_scheduler.config.decay=constant",
        "lr_scheduler.config.warmup_steps=0",
    ]
    results = run_all(
        [
            command("fp32", *hot, "trainer.mixed_precision.mode=off"),
            command("bf16", *hot, *bf16),
            command("clipped", *hot, "trainer.max_grad_norm=1", "trainer.mixed_precision.mode=off"),
            command("good", *cold, "regime.num_data_epochs=1"),
        ]
    )

    for name, result in zip(("fp32", "bf16", "clipped"), results):
        assert result.status == 2, result.output[-3000:]
        assert "error: The loss is nan: the training has diverged." in result.output
        assert "is the first parameter that is not finite." in result.output
        assert steps(tmp_path / name) == []
        assert list(tmp_path.joinpath(name, "checkpoints").glob("step_*")) == []
    assert results[-1].status == 0, results[-1].output[-3000:]
    assert steps(tmp_path / "good") == [4]

    # The run diverges in its second epoch, is started again, and diverges again: its checkpoint stays.
    file = tmp_path / "good" / "config.yaml"
    file.write_text(re.sub(r"(?<!_)temperature: .*", "temperature: 1.0e-38", file.read_text()))
    again = command("good", *cold, "loss.config.temperature=1e-38")
    for result in run_all([again, again]):
        assert result.status == 2, result.output[-3000:]
        assert re.search("^  resumed +from step 4$", result.output, re.MULTILINE), result.output
        assert ": the training has diverged." in result.output
        assert steps(tmp_path / "good") == [4]

    file.write_text(re.sub(r"(?<!_)temperature: .*", "temperature: 0.05", file.read_text()))
    (result,) = run_all([command("good", *cold, "loss.config.temperature=0.05")])
    assert result.status == 0, result.output[-3000:]
    assert steps(tmp_path / "good") == [12]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, bert_folder: Path, texts: Path) -> None:
    valid = ["regime.num_steps=1", f"dataset.paths=[{texts}]", "dataset.batch_size=8", f"model.path={bert_folder}"]

    def command(out: Path, *config: str) -> list[str]:
        return ["train", str(out), "--no-rich", "--config", *valid, *config]

    run, mine, file, configs = (tmp_path / name for name in ("run", "mine", "file", "configs"))
    for folder, name in ((mine, "thesis.tex"), (configs, "config.yaml")):
        folder.mkdir()
        folder.joinpath(name).write_text("precious")
    file.write_text("precious")
    other_seed = ["loss.config.temperature=0.1", "dataset.batch_size=4"]

    first, again, changed, *refused = run_all(
        [command(run), command(run), command(run, *other_seed), command(mine), command(file), command(configs)]
    )

    assert (first.status, again.status, changed.status) == (0, 0, 2), first.output[-3000:] + again.output[-3000:]
    assert "it holds a run with other values in dataset.batch_size, loss.config.temperature." in changed.output
    assert [result.status for result in refused] == [2, 2, 2]
    assert all(f"error: {path} is not valid" in result.output for path, result in zip((mine, file, configs), refused))
    assert [path.name for path in (*mine.iterdir(), *configs.iterdir())] == ["thesis.tex", "config.yaml"]
    assert configs.joinpath("config.yaml").read_text() == file.read_text() == "precious"


def test_an_error_on_one_of_two_processes_is_printed_once(tmp_path: Path, clip_folder: Path, digits: Path) -> None:
    """An image is found to be truncated when it is decoded, in the midst of the training, on one rank."""
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    row = json.loads(data.joinpath("train.jsonl").read_text().splitlines()[40])
    image = data / row["positive_image"]
    image.write_bytes(image.read_bytes()[:-40])
    arguments = ["train", tmp_path / "out", "--no-rich", "--nproc-per-node", 2, "--config", f"model.path={clip_folder}"]
    arguments += [f"dataset.paths=[{data}/train.jsonl]", "dataset.max_rows=64", "dataset.batch_size=4"]

    result = run(*arguments).expect(2)

    errors = [line for line in result.output.splitlines() if "error: " in line or " ERROR: " in line]
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"error: {data}/train.jsonl:41: ")
    assert str(image) in errors[0]
    assert result.output.endswith(errors[0] + "\n")

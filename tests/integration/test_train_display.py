"""What a training shows, as a whole: in a terminal and in a pipe, on one process and on two; and what the log has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.command_line import be_fairseq2, environment, run
from tests.terminal import render, run_in_terminal

MAX_LINES = 30

Arguments = Callable[..., list[object]]


@pytest.fixture
def arguments(bert_folder: Path, texts: Path) -> Arguments:
    """Two epochs of five steps, each with a validation and a checkpoint."""

    def make(folder: Path, *options: object, batch_size: int = 16) -> list[object]:
        return [
            "train", folder, *options, "--config", f"model.path={bert_folder}", f"dataset.paths=[{texts}]",
            f"valid.paths=[{texts}]", f"dataset.batch_size={batch_size}", "regime.num_data_epochs=2",
            "regime.score_metric=mrr", "trainer.mixed_precision.mode=off", "regime.publish_metrics_every_n_steps=1",
        ]  # fmt: skip

    return make


def expected(folder: Path, model: Path, data: Path, *, batch: str = "16 rows", device: str = "cpu, 1 process") -> str:
    """All lines, with ``N`` for what is measured."""
    valid = "MRR N, Recall@1 N, Recall@5 N, Recall@10 N, nDCG@10 N, Hit@1 N"
    return f"""\
Training
  model       {model}: 19,872 parameters, 18,816 trained
  data        83 rows of {data}
  validation  80 queries over 83 documents
  batch       {batch}
  steps       10, 2 epochs of 5
  objective   infonce
  device      {device}, float32
  log         {folder}/logs
Step 5: checkpoint in {folder}/checkpoints/step_5
Step 5: {valid} (best)
Step 10: checkpoint in {folder}/checkpoints/step_10
Step 10: {valid}
Trained 10 steps in N: loss N, lr N, N rows/s.
The model is in {folder}. Next:
  to measure it        fairseq2 vembed evaluate {folder} {data}
  to use it elsewhere  fairseq2 vembed export {folder} FOLDER
"""


def without_numbers(text: str) -> str:
    """Put ``N`` for measured numbers, and leave out lines of a bar, which take time, and whether the last is best."""
    text = re.sub(r"^(Training|Validation): .*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\d+\.\d+(e-\d+)?|\d+:\d\d|[\d,]+(?= rows/s)", "N", text)
    return re.sub(r"(Step 10: MRR.*) \(best\)", r"\1", text)


def test_lines_in_a_pipe(arguments: Arguments, bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(*arguments(folder)).expect(0)

    assert without_numbers(result.output) == expected(folder, bert_folder, texts)
    assert not set(result.output) & set("\x1b\r")
    assert result.output.count("\n") <= MAX_LINES

    log = folder.joinpath("logs", "rank_0.log").read_text()
    kept = ["Activated FileSystem", "DeprecationWarning", "Config: {", "'batch_size': 16", "Environment Variables - "]
    kept += [
        "BertModel(\n",
        "training will be run on CPU",
        "Train Metrics (step 7) - Loss: ",
        "Validation Metrics (step 5)",
    ]
    assert [text for text in kept if text not in log] == []
    assert len([line for line in log.splitlines() if "Train Metrics (step 7)" in line]) == 1


def test_a_bar_in_a_terminal(arguments: Arguments, bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    """What is left in the end is what a pipe gets."""
    folder = tmp_path / "run"
    command = ["vembed", *map(str, arguments(folder))]
    env = {name: value for name, value in environment().items() if name not in ("FAIRSEQ2_NO_PROGRESS", "COLUMNS")}
    env["TERM"] = "xterm-256color"

    status, written = run_in_terminal(be_fairseq2, command, env={**env, "NO_COLOR": "1"})

    assert status == 0, written
    assert without_numbers("\n".join(render(written)) + "\n") == expected(folder, bert_folder, texts)
    bars = re.findall(
        r"Training +[━╸╺ ]+ +(\d+)/10 steps, loss (\d\.\d+), lr [\d.e-]+ ?[\d.e-]*, [\d.,]+ rows/s", written
    )
    assert bars, written
    assert "Validation" in written
    assert re.findall("\x1b\\[[\\d;]*m", written) == []  # Colours.
    assert written.count("\x1b[?25h") > written.count("\x1b[?25l")  # The cursor is never away.


def test_two_processes(arguments: Arguments, bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    """What the first one shows, and nothing of what gloo prints."""
    folder = tmp_path / "run"
    result = run(*arguments(folder, batch_size=8), num_processes=2).expect(0)

    text = expected(folder, bert_folder, texts, batch="16 rows (8 rows x 2 processes)", device="cpu, 2 processes (ddp)")
    assert without_numbers(result.output) == text
    for rank in range(2):
        log = folder.joinpath("logs", f"rank_{rank}.log").read_text()
        assert "[Gloo] Rank" in log
        assert "BertModel(" in log


def test_less_and_more(arguments: Arguments, tmp_path: Path) -> None:
    quiet, verbose = tmp_path / "quiet", tmp_path / "verbose"

    assert run(*arguments(quiet, "--quiet")).expect(0).output == ""
    assert "Train Metrics (step 7)" in quiet.joinpath("logs", "rank_0.log").read_text()

    shown = run(*arguments(verbose, "--verbose", "--no-rich")).expect(0).output
    log = verbose.joinpath("logs", "rank_0.log").read_text()
    for text in ("INFO: fairseq2 - Config: {", "BertModel(", "Train Metrics (step 7) - Loss: ", "Task finished in"):
        assert text in shown
        assert text.removeprefix("INFO: ") in log.replace(" INFO ", " ")
    assert "Training\n" not in shown

    again = run(*arguments(verbose)).expect(0).output
    assert re.search("^  resumed +from step 10$", again, re.MULTILINE)
    assert "The run was complete before: all 10 steps are done.\n" in again

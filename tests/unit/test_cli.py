"""The command line before a verb runs: versions, and names that are not known."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from vembed_fs2.cli import VEMBED


def run(*argv: str) -> int:
    try:
        return VEMBED.main(argv, "fairseq2 vembed")
    except SystemExit as ex:
        return int(ex.code or 0)


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"vembed_fs2 {version('vembed_fs2')}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "'trian' is not known. Did you mean 'train'?"),
        (["models", "archz"], "'archz' is not known. Did you mean 'archs'?"),
        (["xyz"], "'xyz' is not known. Known: train, evaluate, export, models, completion, data, demo."),
    ],
)
def test_a_wrong_verb_gets_the_nearest_one(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "out", "--prset", "list"], "unrecognized arguments: --prset list. Did you mean '--preset'?"),
        (["train", "out", "--nproc=2"], None),
        (["data", "check", "f.jsonl", "--colum=a"], None),
        (["data", "check", "f.jsonl", "--colunm=a"], "unrecognized arguments: --colunm=a. Did you mean '--column'?"),
        (["data", "check", "f.jsonl", "--images", "al"], "--images: 'al' is not known. Did you mean 'all'?"),
        (["export", "a", "b", "--fromat", "hf"], "Did you mean '--format'?"),
        (["completion", "bahs"], "'bahs' is not known. Did you mean 'bash'?"),
        (["models", "archs", "--qqq"], "unrecognized arguments: --qqq\n"),
    ],
)
def test_a_wrong_option_gets_the_nearest_one(
    argv: list[str], message: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vembed_fs2.cli._run", lambda args: 0)  # A shortened option is an option.

    assert run(*argv) == (0 if message is None else 2)
    assert (message or "") in capsys.readouterr().err

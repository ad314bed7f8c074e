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
        (["xyz"], "'xyz' is not known. Known: train, evaluate, export, models, data, demo."),
    ],
)
def test_a_wrong_verb_gets_the_nearest_one(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert message in capsys.readouterr().err

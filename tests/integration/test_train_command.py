"""The ways to start a training, and how light the command line is until it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tests.integration.command_line import FAIRSEQ2, environment, metrics, run, steps
from vembed_fs2 import cli
from vembed_fs2.recipes.presets import describe_presets

PYTHON = sys.executable

_HEAVY = ("torch", "fairseq2", "transformers", "numpy", "PIL", "pyarrow", "rich", "ruamel")

_LOADED = f"""
import sys
from vembed_fs2.cli import main
from vembed_fs2.recipes.presets import describe_presets
sys.argv = ["fairseq2", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
print("HEAVY", [name for name in {_HEAVY} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "GROUP"),
        (["--help"], "vembed"),
        (["vembed", "--help"], "evaluate"),
        (["vembed", "train", "--help"], "--nproc-per-node"),
        (["vembed", "data", "--help"], "check"),
        (["vembed", "export", "--help"], "--format"),
    ],
)
def test_help_imports_nothing_heavy(arguments: list[str], says: str) -> None:
    result = run(*arguments, program=[PYTHON, "-c", _LOADED])

    assert says in result.output
    assert result.output.endswith("HEAVY []\n"), result.output


def test_a_package_that_cannot_be_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = EntryPoint("toy", "vembed_nosuch.cli:TOY", "fairseq2.cli")
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
    for arguments, status in ((["toy", "create"], 1), (["--help"], 0)):
        monkeypatch.setattr(sys, "argv", ["fairseq2", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == status

    printed = capsys.readouterr()
    assert printed.err == "error: vembed_nosuch.cli:TOY cannot be loaded: No module named 'vembed_nosuch'\n"
    assert "(cannot be loaded: No module named 'vembed_nosuch')" in printed.out


@pytest.fixture
def arguments(clip_folder: Path, digits: Path) -> list[str]:
    """All that follows OUTPUT_DIR; two steps."""
    return [
        "--no-rich", "--config", f"model.path={clip_folder}", f"dataset.paths=[{digits}/train.jsonl]",
        "dataset.batch_size=8", "regime.num_steps=2", "regime.publish_metrics_every_n_steps=1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "verb"),
    [
        ([str(Path(FAIRSEQ2).with_name("vembed"))], ["train"]),
        ([PYTHON, "-m", "vembed_fs2"], ["train"]),
        ([PYTHON, "-m", "vembed_fs2.recipes.train"], []),
    ],
    ids=["vembed", "package", "recipe"],
)
def test_other_ways_to_start(program: list[str], verb: list[str]) -> None:
    # That they train is shown by the help of the same parser, and by the others of these tests.
    result = run(*verb, "--preset", "list", program=program).expect(0)

    assert result.output == describe_presets("vembed_fs2.recipes.train") + "\n"


def test_torchrun(arguments: list[str], tmp_path: Path) -> None:
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    run("train", tmp_path / "run", *arguments, program=[*torchrun, FAIRSEQ2, "vembed"]).expect(0)

    assert steps(tmp_path / "run") == [2]
    assert list(metrics(tmp_path / "run")) == [1, 2]
    assert metrics(tmp_path / "run", "Total Number of Queries") == {1: 16, 2: 32}


def test_the_working_folder_shadows_no_module(arguments: list[str], tmp_path: Path) -> None:
    """On two processes as on one: a user's own files are often named so."""
    for name in ("datasets", "tokenizers", "random"):
        tmp_path.joinpath(f"{name}.py").write_text("raise SystemExit('imported')\n")
    command = [FAIRSEQ2, "vembed", "train", "run", "--nproc-per-node", "2", *arguments]

    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run/metrics/train.jsonl").read_text().splitlines()[-1])["Step"] == 2

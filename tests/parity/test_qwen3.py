"""Decoders against transformers: the same weights, the same outputs, the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq2.models.transformer import NaiveSDPA, TorchSDPA, set_default_sdpa_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor

from vembed_fs2 import Embedder
from vembed_fs2.embedding.model import EncoderBatch, HeadConfig, Pooling
from vembed_fs2.errors import ConfigError, ModelLoadError, VembedError
from vembed_fs2.files import read_json
from vembed_fs2.models.family import find_family
from vembed_fs2.models.qwen3 import Qwen3CheckpointFormat, Qwen3Config, create_qwen3_model

from .text_backbones import (
    ACTIVATIONS,
    LONG_TEXT,
    TEXTS,
    assert_dropout_equal,
    assert_embedder_equals,
    assert_gradients_equal,
    assert_independent_of_batch,
    assert_round_trip,
    build,
    edit,
    load,
    make_hf,
    make_inputs,
    max_diff,
    reference_pool,
    write_bpe,
    write_folder,
)

FORMAT = Qwen3CheckpointFormat()

VARIANTS = ["Qwen3", "Qwen2", "Mistral", "Llama"]

TINY = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
}

SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "attention_factor": 0.7,
     "beta_fast": 8.0, "beta_slow": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
]  # fmt: skip


@st.composite
def hf_configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(VARIANTS))
    kv_heads = draw(st.integers(1, 2))
    heads, head_dim = kv_heads * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 5))
    vocab_size, num_layers = draw(st.integers(20, 80)), draw(st.integers(1, 4))
    config = {
        "vocab_size": vocab_size,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.integers(1, 40)),
        "hidden_act": draw(st.sampled_from(ACTIVATIONS)),
        "max_position_embeddings": draw(st.integers(12, 40)),
        "initializer_range": draw(st.sampled_from([0.02, 0.3])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "pad_token_id": draw(st.one_of(st.none(), st.integers(0, vocab_size - 1))),
        "rope_theta": draw(st.sampled_from([1e6, 1e4, 50.0])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.2])),
    }
    if name in ("Qwen3", "Llama", "Mistral"):
        # Heads need not fill the model's size.
        config["head_dim"] = head_dim + 2 * draw(st.integers(0, 2))
    if name in ("Qwen3", "Llama"):
        config["attention_bias"] = draw(st.booleans())
    if name == "Llama":
        config["mlp_bias"] = draw(st.booleans())
    if name != "Mistral":
        config["rope_scaling"] = draw(st.sampled_from(SCALINGS))

    window = draw(st.sampled_from([None, 1, 3, 8, 100]))
    if name == "Mistral":
        config["sliding_window"] = window
    if name.startswith("Qwen") and window is not None:
        first = draw(st.integers(0, num_layers - 1))
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": first}

    return name, config


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    model=hf_configs(),
    pooling=st.sampled_from(["mean", "max", "last"]),
    lengths=st.lists(st.sampled_from([1, 2, 3, 7, 12, 30]), min_size=1, max_size=4),
    attention=st.sampled_from(["sdpa", "eager"]),
    seed=st.integers(0, 100),
)
def test_equals_transformers(
    model: tuple[str, dict[str, Any]], pooling: Pooling, lengths: list[int], attention: str, seed: int
) -> None:
    name, config = model
    hf = make_hf(name, {**config, "attn_implementation": attention}, seed=seed)
    ours = load(FORMAT, create_qwen3_model, hf, HeadConfig(pooling=pooling))
    ids, mask = make_inputs(config["vocab_size"], lengths, config.get("pad_token_id"))
    with torch.no_grad():
        expected = hf(ids, mask.long())[0]
        batch = EncoderBatch.of_text(ids, mask)
        states, embeds = ours.encode_tokens(batch), ours(batch).values
    assert max_diff(states[mask], expected[mask]) <= 1e-5
    assert max_diff(embeds, reference_pool(expected, mask, pooling)) <= 1e-5


def full_attention(hf: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The states of transformers' model if each token sees all tokens of its text."""
    allowed = mask[:, None, None, :].expand(-1, 1, ids.size(1), -1)
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    if isinstance(hf, (transformers.Qwen2Model, transformers.Qwen3Model)):
        states: Tensor = hf(ids, {"full_attention": bias})[0]
    else:
        states = hf(ids, bias)[0]
    return states


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lengths", [[20, 5, 1], [12, 12]])
def test_attention_in_both_directions(name: str, lengths: list[int]) -> None:
    options = {"sliding_window": None} if name == "Mistral" else {}
    hf = make_hf(name, {**TINY, **options, "is_causal": False, "attn_implementation": "eager"})
    ours = load(FORMAT, create_qwen3_model, hf)
    assert not any(layer.self_attn.sdpa.causal for layer in ours.decoder.layers)

    ids, mask = make_inputs(60, lengths, 0)
    with torch.no_grad():
        expected = full_attention(hf, ids, mask)
        states = ours.encode_tokens(EncoderBatch.of_text(ids, mask))
        assert max_diff(expected[mask], hf(ids, mask.long())[0][mask]) > 1e-2
    assert max_diff(states[mask], expected[mask]) <= 1e-5


@pytest.mark.parametrize(
    ("values", "is_causal", "pooling"),
    [
        ({}, True, "last"),
        ({"is_causal": False}, False, "mean"),
        ({"is_causal": True, "use_bidirectional_attention": True}, True, "last"),
        ({"use_bidirectional_attention": True}, False, "mean"),
        ({"architectures": ["LlamaBidirectionalModel"]}, False, "mean"),
        ({"architectures": ["VoyageQwen3BidirectionalEmbedModel"], "pooling": "last"}, False, "last"),
        ({"model_type": "llama_bidirec", "pooling": "avg"}, False, "mean"),
    ],
)
def test_direction_in_every_spelling(values: dict[str, Any], is_causal: bool, pooling: str) -> None:
    config = FORMAT.from_hf_config({**TINY, "model_type": "llama", **values})
    assert (config.variant, config.is_causal, config.head.pooling) == ("llama", is_causal, pooling)


def test_bidirectional_models_are_written_as_version_5_reads_them() -> None:
    config = FORMAT.from_hf_config({**TINY, "model_type": "qwen3", "is_causal": False})
    assert FORMAT.to_hg_config(config).data["is_causal"] is False
    assert "is_causal" not in FORMAT.to_hg_config(FORMAT.from_hf_config({**TINY, "model_type": "qwen3"})).data


def test_a_direction_that_was_changed_is_written(tmp_path: Path) -> None:
    """Whatever spelling the folder had: it travels along with what else there was."""
    content = {**TINY, "model_type": "llama", "use_bidirectional_attention": True}
    config = FORMAT.from_hf_config(content)
    config.extra_fields = {"config.json": FORMAT.find_extra_fields(content, config)}
    for is_causal in (False, True):
        config.is_causal = is_causal
        FORMAT.write_config(tmp_path, config)
        written = read_json(tmp_path / "config.json")
        assert written["use_bidirectional_attention"] is True
        assert FORMAT.from_hf_config(written).is_causal is is_causal


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(tmp_path: Path) -> None:
    write_bpe(tmp_path, "PreTrainedTokenizerFast", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    size = len(transformers.AutoTokenizer.from_pretrained(tmp_path)) - 1
    make_hf("Qwen3", {**TINY, "vocab_size": size}).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=f"the model's has {size}"):
        Embedder.load(tmp_path, device="cpu")


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(model=hf_configs())
def test_round_trip_is_bitwise(model: tuple[str, dict[str, Any]]) -> None:
    assert_round_trip(FORMAT, create_qwen3_model, make_hf(*model))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lengths", [[20, 5, 1], [40, 40]])
def test_gradients_equal_transformers(name: str, lengths: list[int]) -> None:
    assert_gradients_equal(FORMAT, create_qwen3_model, make_hf(name, TINY), *make_inputs(60, lengths, 0))


def test_dropout_is_where_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_hf("Qwen3", {**TINY, "attention_dropout": 0.3, "attn_implementation": "eager"})
    assert_dropout_equal(monkeypatch, hf, load(FORMAT, create_qwen3_model, hf), make_inputs(60, [20] * 4, 0)[0])


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "weightedmean"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_row_does_not_depend_on_the_batch(pooling: Pooling, is_causal: bool) -> None:
    hf = make_hf("Qwen3", {**TINY, "is_causal": is_causal}, seed=3)
    model = load(FORMAT, create_qwen3_model, hf, HeadConfig(pooling=pooling))
    wide = EncoderBatch.of_text(torch.randint(60, (1, 50)), torch.ones(1, 50))
    assert_independent_of_batch(model, *make_inputs(60, [20, 5, 1, 13], 0), wide)


@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"use_sliding_window": True, "sliding_window": 4}])
def test_users_choice_of_attention_is_respected(options: dict[str, Any]) -> None:
    hf = make_hf("Qwen3", {**TINY, "max_window_layers": 1, **options})
    ids, mask = make_inputs(60, [20, 5, 1], 0)
    batch = EncoderBatch.of_text(ids, mask)
    set_default_sdpa_factory(NaiveSDPA)
    try:
        model = load(FORMAT, create_qwen3_model, hf)
    finally:
        set_default_sdpa_factory(TorchSDPA)
    assert all(isinstance(layer.self_attn.sdpa, NaiveSDPA) for layer in model.decoder.layers)
    with torch.no_grad():
        assert max_diff(model(batch).values, load(FORMAT, create_qwen3_model, hf)(batch).values) <= 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_defaults_are_those_of_transformers(name: str) -> None:
    defaults = getattr(transformers, f"{name}Config")().to_dict()
    assert FORMAT.from_hf_config({"model_type": name.lower()}) == FORMAT.from_hf_config(defaults)
    assert find_family(name.lower()) == "vembed_qwen3"


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 7.0]}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "options",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 6},
        {"rope_scaling": {**LONGROPE, "factor": 8.0}, "max_position_embeddings": 6},
        {
            "rope_scaling": {**LONGROPE, "factor": 2.0, "attention_factor": 1.2},
            "original_max_position_embeddings": 6,
        },
    ],
)
def test_positions_that_depend_on_the_length_of_a_text(name: str, options: dict[str, Any]) -> None:
    """Of that text: what else is in the batch does not count."""
    hf = make_hf(name, {**TINY, "rope_theta": 50.0, **options})
    ours = load(FORMAT, create_qwen3_model, hf)
    for lengths in ([3, 20, 6, 7], [20, 20], [6, 5, 4]):
        ids, mask = make_inputs(60, lengths, 0)
        with torch.no_grad():
            states = ours.encode_tokens(EncoderBatch.of_text(ids, mask))
            for row, length in enumerate(lengths):
                hf(ids[:1, :1])  # It would keep the frequencies of a longer text before.
                assert max_diff(states[row, :length], hf(ids[row : row + 1, :length])[0][0]) <= 1e-5

    config = FORMAT.from_hf_config(hf.config.to_dict())
    written = FORMAT.describe_config(config)
    assert {name: written[name] for name in options} == options
    assert FORMAT.from_hf_config(written) == config


@pytest.mark.parametrize("scaling", [*SCALINGS, {"rope_type": "dynamic", "factor": 2.0}, LONGROPE])
def test_rope_parameters_of_version_5(scaling: dict[str, Any] | None) -> None:
    old = {**TINY, "model_type": "llama", "rope_theta": 500.0, "rope_scaling": scaling}
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": 500.0}
    if scaling is LONGROPE:
        old["original_max_position_embeddings"] = parameters["original_max_position_embeddings"] = 16
    new = {**TINY, "model_type": "llama", "rope_parameters": parameters}
    assert FORMAT.from_hf_config(new) == FORMAT.from_hf_config(old)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling.rope_type", {"rope_type": "other", "factor": 2.0}),
        ("rope_scaling.long_factor", {**LONGROPE, "factor": 2.0, "long_factor": [1.0]}),
        ("rope_scaling.mrope_section", {"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 1, 1]}),
        ("partial_rotary_factor", 0.5),
        ("is_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("hidden_act", "no_such"),
        ("hidden_size", "16"),
        ("num_key_value_heads", 3),
        ("head_dim", 5),
        ("rms_norm_eps", -1.0),
        ("rope_theta", 0.0),
        ("attention_bias", 1),
        ("attention_dropout", 1.5),
    ],
)
def test_unsupported_options_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"`{field}`"):
        FORMAT.from_hf_config({**TINY, "model_type": "llama", field.partition(".")[0]: value})


def test_every_error_of_a_config_is_listed() -> None:
    config = Qwen3Config(variant="gpt", activation="no_such", num_layers=2, windowed_layers=[5], num_key_value_heads=3)  # type: ignore[arg-type]
    config.head = HeadConfig(pooling="cls")
    with pytest.raises(ConfigError) as info:
        create_qwen3_model(config)
    for part in ("variant", "activation", "attn_window", "between 0 and 1", "num_key_value_heads", "first token"):
        assert any(part in error for error in info.value.errors), part


def test_what_transformers_cannot_express_is_refused_by_name() -> None:
    tiny = FORMAT.from_hf_config({**TINY, "model_type": "mistral", "sliding_window": 4})
    tiny.windowed_layers = [0]
    with pytest.raises(VembedError, match="`windowed_layers`"):
        FORMAT.to_hg_config(tiny)
    tiny = FORMAT.from_hf_config({**TINY, "model_type": "qwen2"})
    tiny.qkv_bias = False
    with pytest.raises(VembedError, match="`qkv_bias`"):
        FORMAT.to_hg_config(tiny)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_with_and_without_prefix_and_head(name: str) -> None:
    hf = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**TINY))
    config = FORMAT.from_hf_config(hf.config.to_dict())
    with_head = FORMAT.from_hf_state_dict(hf.state_dict(), config)
    bare = FORMAT.from_hf_state_dict(hf.model.state_dict(), config)
    assert with_head.keys() == bare.keys() == create_qwen3_model(config).state_dict().keys()
    assert FORMAT.to_hg_state_dict(with_head, config).keys() == hf.model.state_dict().keys()


def write_qwen_tokenizer(folder: Path) -> None:
    """A tokenizer as Qwen3-Embedding has it: the token that it appends is the padding, and it pads on the left."""
    write_bpe(folder, "PreTrainedTokenizerFast", ("<|im_start|>", "<|endoftext|>", "<|im_end|>", "[UNK]", "[MASK]"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    appended = [("<|endoftext|>", tokenizer.pad_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=appended
    )
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("max_seq_length", [20, None])
def test_sentence_transformers_folder(tmp_path: Path, name: str, max_seq_length: int | None) -> None:
    backbone = write_folder(tmp_path / "backbone", name, TINY, write_qwen_tokenizer, 8192)
    folder = build(backbone, tmp_path / "m", "lasttoken", max_seq_length=max_seq_length)
    embedder = assert_embedder_equals(folder, [*TEXTS, "", LONG_TEXT])
    assert embedder.source.family == "vembed_qwen3"


def test_checkpoint_of_a_published_embedder(tmp_path: Path) -> None:
    """Its tensors have no prefix although ``architectures`` names a language model; it has no modules' weights."""
    backbone = write_folder(tmp_path / "backbone", "Qwen3", TINY, write_qwen_tokenizer, 64)
    expected = Embedder.load(backbone, device="cpu").encode(TEXTS)

    edit(backbone / "config.json", architectures=["Qwen3ForCausalLM"])
    assert abs(Embedder.load(backbone, device="cpu").encode(TEXTS) - expected).max() == 0.0

    tensors = {f"model.{key}": value for key, value in load_file(backbone / "model.safetensors").items()}
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, backbone / "model.safetensors", {"format": "pt"})
    assert abs(Embedder.load(backbone, device="cpu").encode(TEXTS) - expected).max() == 0.0


def test_a_tokenizer_without_an_end_token_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backbone = write_folder(tmp_path / "with", "Qwen3", TINY, write_qwen_tokenizer, 64)
    Embedder.load(backbone, device="cpu")
    assert "appends no end token" not in caplog.text

    file = backbone / "tokenizer.json"
    edit(file, post_processor=None)
    Embedder.load(backbone, device="cpu")
    assert f"its tokenizer in {backbone} appends no end token" in caplog.text


def test_is_created_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = create_qwen3_model(FORMAT.from_hf_config({**TINY, "model_type": "llama", "rope_scaling": SCALINGS[2]}))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert not list(model.named_buffers())


@pytest.mark.parametrize("name", VARIANTS)
def test_initial_weights_are_drawn_as_transformers_draws_them(name: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 200, "head_dim": 32}
    config = getattr(transformers, f"{name}Config")(**{**TINY, **sizes})
    hf = getattr(transformers, f"{name}Model")(config).state_dict()
    ours_config = FORMAT.from_hf_config(config.to_dict())
    ours: dict[str, Any] = FORMAT.to_hg_state_dict(dict(create_qwen3_model(ours_config).state_dict()), ours_config)
    for key, tensor in hf.items():
        assert abs(float(ours[key].std()) - float(tensor.std())) <= 0.1 * float(tensor.std()) + 1e-9, key


PUBLISHED = {
    "qwen3_embedding_0_6b": (595_776_512, "Qwen3"),
    "qwen3_embedding_4b": (4_021_774_336, "Qwen3"),
    "qwen3_embedding_8b": (7_567_295_488, "Qwen3"),
    "gte_qwen2_1_5b": (1_543_268_864, "Qwen2"),
    "gte_qwen2_7b": (7_069_121_024, "Qwen2"),
    "e5_mistral_7b": (7_110_660_096, "Mistral"),
}
"""Parameters without a language-model head, and transformers' model."""


@pytest.mark.parametrize("arch", PUBLISHED)
def test_tensors_of_published_sizes_equal_transformers(arch: str) -> None:
    from fairseq2.models import ModelFamily

    from vembed_fs2.resolver import get_resolver

    config: Any = get_resolver().resolve(ModelFamily, key="vembed_qwen3").maybe_get_arch_config(arch)
    hf_config = FORMAT.to_hg_config(config)
    count, name = PUBLISHED[arch]
    with torch.device("meta"):
        ours = create_qwen3_model(config)
        hf = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**hf_config.data))
    assert sum(p.numel() for p in ours.parameters()) == count
    written: dict[str, Any] = FORMAT.to_hg_state_dict(dict(ours.state_dict()), config)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in hf.state_dict().items()}

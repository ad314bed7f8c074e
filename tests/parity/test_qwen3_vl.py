"""Qwen3-VL against transformers: the same weights, the same outputs, the same files, and the whole way from inputs."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor
from transformers.models.qwen3_vl import Qwen3VLConfig as HFConfig
from transformers.models.qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen3_vl import Qwen3VLModel as HFModel

from vembed_fs2 import Embedder
from vembed_fs2.embedding.inputs import ImageInputs, Kind, TextInputs
from vembed_fs2.embedding.model import EncoderBatch, HeadConfig
from vembed_fs2.errors import ConfigError, DataError, ModelLoadError
from vembed_fs2.models.family import find_family
from vembed_fs2.models.qwen3_vl import Qwen3VLCheckpointFormat, Qwen3VLConfig, VisionConfig, create_qwen3_vl_model
from vembed_fs2.models.qwen3_vl.processor import INSTRUCTION, TEMPLATE

from .text_backbones import TEXTS, add_noise, edit, max_diff, write_bpe

FORMAT = Qwen3VLCheckpointFormat()

IMAGE, VIDEO, START, END = 50, 51, 52, 53

TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END
}  # fmt: skip

TEXT = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "rope_theta": 100.0,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
}  # fmt: skip

VISION = {
    "depth": 3, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "patch_size": 4, "out_hidden_size": 24,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2],
}  # fmt: skip


@st.composite
def hf_configs(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 2))
    sections = draw(st.sampled_from([[2, 1, 1], [0, 2, 2], [4, 1, 0], [1, 0, 1]]))
    dim = 8 * draw(st.integers(1, 3))
    depth = draw(st.integers(1, 3))
    text = {
        **TEXT,
        "hidden_size": dim,
        "num_hidden_layers": draw(st.integers(depth, 4)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([12, 16])),
        "intermediate_size": draw(st.integers(1, 30)),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_theta": draw(st.sampled_from([5e6, 50.0])),
        "rope_scaling": {"rope_type": "default", "mrope_section": sections},
        "attention_bias": draw(st.booleans()),
        "initializer_range": draw(st.sampled_from([0.02, 0.2])),
    }
    heads = draw(st.integers(1, 3))
    vision = {
        **VISION,
        "depth": depth,
        "hidden_size": heads * 4 * draw(st.integers(1, 3)),
        "num_heads": heads,
        "intermediate_size": draw(st.integers(1, 30)),
        "hidden_act": draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "silu"])),
        "in_channels": draw(st.sampled_from([1, 3])),
        "patch_size": draw(st.sampled_from([2, 4])),
        "spatial_merge_size": draw(st.sampled_from([1, 2, 3])),
        "temporal_patch_size": draw(st.sampled_from([1, 2])),
        "out_hidden_size": dim,
        "num_position_embeddings": draw(st.sampled_from([4, 16, 49])),
        "deepstack_visual_indexes": draw(st.lists(st.integers(0, depth - 1), unique=True, max_size=depth).map(sorted)),
    }
    return {"text_config": text, "vision_config": vision, **TOKENS}


def make_hf(config: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    hf = HFModel._from_config(HFConfig(**config), attn_implementation="eager")
    add_noise(hf)
    return hf.eval()


def load(hf: Any) -> Any:
    state = hf.state_dict()
    config = FORMAT.from_hf_config(hf.config.to_dict(), keys=frozenset(state))
    model = create_qwen3_vl_model(config)
    model.load_state_dict(FORMAT.from_hf_state_dict(state, config))
    return model.eval()


def make_rows(config: dict[str, Any], counts: list[int], seed: int) -> list[tuple[list[int], list[list[int]]]]:
    """Rows of texts with images between them: token ids, and the patches of each image."""
    draw = random.Random(seed)
    merge = config["vision_config"].get("spatial_merge_size", 2)
    rows = []
    for count in counts:
        ids, grids = [draw.randrange(50) for _ in range(draw.randint(1, 6))], []
        for _ in range(count):
            grid = [1, merge * draw.randint(1, 3), merge * draw.randint(1, 3)]
            grids.append(grid)
            ids += [START, *[IMAGE] * (grid[1] * grid[2] // merge**2), END]
            ids += [draw.randrange(50) for _ in range(draw.randint(0, 3))]
        rows.append((ids, grids))
    return rows


def make_batch(config: dict[str, Any], rows: list[tuple[list[int], list[list[int]]]], seed: int = 0) -> EncoderBatch:
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (values, _) in enumerate(rows):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = True

    text, images = TextInputs(ids, torch.arange(len(rows)), mask), None
    if any(grids for _, grids in rows):
        vision = {"in_channels": 3, "temporal_patch_size": 2, **config["vision_config"]}
        grids = torch.tensor([grid for _, grids in rows for grid in grids])
        owner = torch.tensor([row for row, (_, grids) in enumerate(rows) for _ in grids])
        dim = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        noise = torch.Generator().manual_seed(seed)
        images = ImageInputs(torch.randn(int(grids.prod(1).sum()), dim, generator=noise), owner, grids)
    return EncoderBatch(len(rows), text, images)


def hf_states(hf: Any, batch: EncoderBatch) -> Tensor:
    assert batch.text is not None
    assert batch.text.attention_mask is not None
    images = {}
    if batch.images is not None:
        images = {"pixel_values": batch.images.values, "image_grid_thw": batch.images.grids}
    states: Tensor = hf(input_ids=batch.text.input_ids, attention_mask=batch.text.attention_mask.long(), **images)[0]
    return states


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    config=hf_configs(),
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_equals_transformers(config: dict[str, Any], counts: list[int], seed: int) -> None:
    hf = make_hf(config, seed)
    model = load(hf)
    batch = make_batch(config, make_rows(config, counts, seed), seed)
    assert batch.text is not None
    mask = batch.text.attention_mask
    with torch.no_grad():
        expected, states = hf_states(hf, batch), model.encode_states(batch).tokens
        embeds = model(batch).values
    assert max_diff(states[mask], expected[mask]) <= 1e-5
    last = torch.stack([row[m][-1] for row, m in zip(expected, mask)])
    assert max_diff(embeds, last) <= 1e-5


def test_rope_parameters_of_version_5() -> None:
    text = {name: value for name, value in TEXT.items() if not name.startswith("rope_")}
    parameters = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    new = {"text_config": text | {"rope_parameters": parameters}, "vision_config": VISION, **TOKENS}
    config = FORMAT.from_hf_config(new)
    assert (config.rope_theta, config.mrope_section) == (100.0, [2, 1, 1])
    assert config == FORMAT.from_hf_config({"text_config": TEXT, "vision_config": VISION, **TOKENS})

    parameters |= {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(ModelLoadError, match=r"rope_scaling` is .*yarn"):
        FORMAT.from_hf_config(new)


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(config=hf_configs())
def test_round_trip_is_bitwise(config: dict[str, Any]) -> None:
    hf = make_hf(config)
    ours = FORMAT.from_hf_config(hf.config.to_dict())
    back, expected = FORMAT.to_hg_state_dict(dict(load(hf).state_dict()), ours), hf.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)  # type: ignore[arg-type]
    data = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in FORMAT.to_hg_config(ours).data.items()}
    assert FORMAT.from_hf_config(HFConfig(**data).to_dict()) == ours
    assert find_family("qwen3_vl") == "vembed_qwen3_vl"


def test_gradients_equal_transformers() -> None:
    config = {"text_config": TEXT, "vision_config": VISION, **TOKENS}
    hf = make_hf(config).train()
    model = load(hf).train()
    batch = make_batch(config, make_rows(config, [2, 0, 1], 3))
    assert batch.text is not None
    expected, states = hf_states(hf, batch), model.encode_states(batch).tokens
    direction = torch.randn_like(expected) * batch.text.attention_mask.unsqueeze(2)  # type: ignore[union-attr]
    (expected * direction).sum().backward()
    (states * direction).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    back: dict[str, Any] = FORMAT.to_hg_state_dict(dict(grads), FORMAT.from_hf_config(hf.config.to_dict()))
    for name, parameter in hf.named_parameters():
        assert max_diff(back[name], parameter.grad) <= 1e-5 * max(1.0, float(parameter.grad.abs().max())), name


def test_row_does_not_depend_on_the_batch() -> None:
    config = {"text_config": TEXT, "vision_config": VISION, **TOKENS}
    model = load(make_hf(config, 3))
    batch = make_batch(config, make_rows(config, [2, 0, 1, 3, 0, 1, 2, 1], 5))
    with torch.no_grad():
        together = model(batch).values
        alone = torch.cat([model(batch.select([row])).values for row in range(8)])
        order = [5, 0, 7, 2, 1, 3, 6, 4]
        assert max_diff(model(batch.select(order)).values, together[order]) <= 1e-6
        longer = make_batch(config, make_rows(config, [6], 9))
        assert max_diff(model(EncoderBatch.concat([batch, longer])).values[:8], together) <= 1e-6
    assert max_diff(together, alone) <= 1e-6


def test_a_blank_row_of_each_kind_is_encoded() -> None:
    model = load(make_hf({"text_config": TEXT, "vision_config": VISION, **TOKENS}))
    for kind in (Kind.TEXT, Kind.TEXT | Kind.IMAGE):
        blank = model.blank(kind)
        assert blank.profile().kinds == [int(kind)]
        assert model(blank).values.isfinite().all()


def test_placeholders_without_their_images_are_refused() -> None:
    config = {"text_config": TEXT, "vision_config": VISION, **TOKENS}
    model = load(make_hf(config))
    batch = make_batch(config, make_rows(config, [1, 0], 1))
    with pytest.raises(DataError, match="placeholders, but no image"):
        model(EncoderBatch(2, batch.text))
    assert batch.text is not None
    batch.text.input_ids[batch.text.input_ids == IMAGE] = 1
    with pytest.raises(DataError, match="Row 0 has not as many tokens together"):
        model(batch)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_config", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("text_config", "hidden_act", "no_such"),
        ("text_config", "num_key_value_heads", 3),
        ("vision_config", "out_hidden_size", 8),
        ("vision_config", "num_position_embeddings", 5),
        ("vision_config", "num_heads", 3),
    ],
)
def test_unsupported_options_are_refused_by_name(part: str, field: str, value: object) -> None:
    config: dict[str, Any] = {"text_config": TEXT, "vision_config": VISION, **TOKENS}
    with pytest.raises(ModelLoadError, match=f"`{part}.{field}`"):
        FORMAT.from_hf_config({**config, part: {**config[part], field: value}})


def test_every_error_of_a_config_is_listed() -> None:
    config = Qwen3VLConfig(mrope_section=[30, 30, 30], image_idx=-1)
    config.vision = VisionConfig(num_positions=5, deepstack_layers=[99], model_dim=10, num_attn_heads=4)
    with pytest.raises(ConfigError) as info:
        create_qwen3_vl_model(config)
    for part in ("mrope_section", "image_idx", "num_positions", "deepstack_layers", "model_dim"):
        assert any(part in error for error in info.value.errors), part


PUBLISHED = {"qwen3_vl_embedding_2b": 2_127_532_032, "qwen3_vl_embedding_8b": 8_144_793_840}
"""Parameters without a language-model head."""


@pytest.mark.parametrize("arch", PUBLISHED)
def test_tensors_of_published_sizes_equal_transformers(arch: str) -> None:
    from fairseq2.models import ModelFamily

    from vembed_fs2.resolver import get_resolver

    config: Any = get_resolver().resolve(ModelFamily, key="vembed_qwen3_vl").maybe_get_arch_config(arch)
    data = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in FORMAT.to_hg_config(config).data.items()}
    with torch.device("meta"):
        ours = create_qwen3_vl_model(config)
        hf = HFModel(HFConfig(**data))
    assert sum(p.numel() for p in ours.parameters()) == PUBLISHED[arch]
    written: dict[str, Any] = FORMAT.to_hg_state_dict(dict(ours.state_dict()), config)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in hf.state_dict().items()}


SPECIAL = ["<|im_start|>", "<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Qwen3-VL-Embedding is: a conditional generation model, a chat template, an appended token."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    write_bpe(folder, "PreTrainedTokenizerFast", SPECIAL[:5])
    bpe = transformers.AutoTokenizer.from_pretrained(folder)
    for file in folder.iterdir():
        file.unlink()
    end = [("<|endoftext|>", bpe.convert_tokens_to_ids("<|endoftext|>"))]
    bpe.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", pair="$A $B <|endoftext|>", special_tokens=end
    )
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bpe.backend_tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token=None,
        bos_token=None, chat_template=TEMPLATE, additional_special_tokens=SPECIAL,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, min_pixels=4 * 64, max_pixels=30 * 64, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)

    ids = dict(zip(TOKENS, tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", *SPECIAL[3:5]])))
    torch.manual_seed(0)
    text = {**TEXT, "vocab_size": len(tokenizer) + 3}
    hf = Qwen3VLForConditionalGeneration(HFConfig(text_config=text, vision_config=VISION, **ids))
    add_noise(hf)
    hf.save_pretrained(folder)
    return folder


def photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    first, second = (Image.fromarray(image) for image in load_sample_images().images)
    return [first, second.resize((90, 300)), first.resize((17, 23)), second.convert("L").resize((400, 60))]


def encode_with_transformers(folder: Path, inputs: list[Any], instruction: str = INSTRUCTION) -> np.ndarray[Any, Any]:
    """The reference's way: chat template, processor, model, last token of the mask, unit length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = Qwen2VLImageProcessor.from_pretrained(folder)
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=TEMPLATE)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder).model.eval()
    found = []
    for parts in inputs:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in parts
        ]
        system = {"role": "system", "content": [{"type": "text", "text": instruction}]}
        chat = [system, {"role": "user", "content": content}]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        own = [part for part in parts if not isinstance(part, str)]
        batch = processor(text=[text], images=own or None, return_tensors="pt", padding=True)
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        found.append(torch.nn.functional.normalize(states[0, -1], dim=0).numpy())
    return np.stack(found)


def test_the_whole_way_equals_transformers(folder: Path) -> None:
    a, b, c, d = photographs()
    inputs: list[Any] = [
        ["a man is eating food"], [a], [b, "the quick brown fox"], ["two women", c, "are sitting", d, "on a bench"],
        [a, b, c], [TEXTS[-1]],
    ]  # fmt: skip
    embedder = Embedder.load(folder, device="cpu")
    assert (embedder.source.family, embedder.embedding_dim) == ("vembed_qwen3_vl", 24)

    expected = encode_with_transformers(folder, inputs)
    found = embedder.encode([parts[0] if len(parts) == 1 else parts for parts in inputs])
    assert np.abs(found - expected).max() <= 1e-5

    instructed = encode_with_transformers(folder, inputs[:3], "Find the fox.")
    assert (
        np.abs(
            embedder.encode([p[0] if len(p) == 1 else p for p in inputs[:3]], prompt="Find the fox") - instructed
        ).max()
        <= 1e-5
    )
    own = {"text": "the quick brown fox", "image": b, "instruction": "Find the fox"}
    assert np.abs(embedder.encode(own) - instructed[2]).max() <= 1e-5


def test_an_empty_text_says_null(folder: Path) -> None:
    embedder = Embedder.load(folder, device="cpu")
    assert np.abs(embedder.encode("") - encode_with_transformers(folder, [["NULL"]])[0]).max() <= 1e-5


def test_only_texts_are_cut(folder: Path) -> None:
    embedder = Embedder.load(folder, device="cpu", max_length=90)
    image = photographs()[0]
    words = " ".join(TEXTS * 20)
    batch = embedder.processor([_item(image, words), _item(None, words)])
    assert batch.text is not None
    tokenizer = embedder.processor.text.tokenizer
    for row in batch.text.input_ids:
        text = tokenizer.decode(row)
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n<|endoftext|>")
        assert text.startswith(f"<|im_start|>system\n{INSTRUCTION}")
    assert batch.text.attention_mask is not None
    assert batch.text.attention_mask.sum(1).tolist() == [90, 90]
    assert (batch.text.input_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum().item() == int(
        batch.images.grids.prod(1).sum() // 4  # type: ignore[union-attr]
    )


def _item(image: Any, text: str) -> Any:
    from vembed_fs2.data.example import Item

    return Item(text=text, images=() if image is None else (image,))


def test_images_that_are_too_long_are_their_rows_error(folder: Path) -> None:
    embedder = Embedder.load(folder, device="cpu", max_length=60)
    with pytest.raises(DataError, match=r"Input 1: .*tokens without its text, .*pixels.*takes 60\. Lower `max_pixels`"):
        embedder.encode(["fine", [photographs()[0], "a text"]])


def test_a_budget_of_pixels_is_kept_with_the_model(folder: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(folder, device="cpu")
    image = photographs()[0]
    embedder.processor.settings.max_pixels = 6 * 64
    small = embedder.processor([_item(image, "")])
    embedder.save_hf(tmp_path / "small")
    again = Embedder.load(tmp_path / "small", device="cpu").processor([_item(image, "")])
    for batch in (small, again):
        assert batch.images is not None
        assert batch.images.num_patches().tolist() == [16]


def test_saved_folders_give_the_same_vectors(folder: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(folder, device="cpu")
    inputs = ["a man is eating food", [photographs()[1], "the quick brown fox"]]
    expected = embedder.encode(inputs)

    embedder.save_hf(tmp_path / "hf")
    assert np.abs(Embedder.load(tmp_path / "hf", device="cpu").encode(inputs) - expected).max() <= 1e-6
    hf = HFModel.from_pretrained(tmp_path / "hf")
    published = Qwen3VLForConditionalGeneration.from_pretrained(folder).model.state_dict()
    assert all(torch.equal(value, published[key]) for key, value in hf.state_dict().items())


@pytest.mark.parametrize(
    ("normalize", "unit", "unit_if_refused"), [(None, True, False), (True, True, True), (False, False, False)]
)
def test_what_a_head_says_of_the_length_is_obeyed(
    folder: Path, normalize: bool | None, unit: bool, unit_if_refused: bool
) -> None:
    embedder = Embedder.load(folder, device="cpu")
    assert embedder.source.config.head.normalize is None
    embedder.model.set_head(HeadConfig(pooling="last", normalize=normalize), 24)  # type: ignore[operator]
    inputs = ["a man is eating food", [photographs()[1], "the quick brown fox"]]
    for options, expected in (({}, unit), ({"normalize_embeddings": False}, unit_if_refused)):
        lengths = np.linalg.norm(embedder.encode(inputs, **options), axis=1)
        assert bool((abs(lengths - 1.0) < 1e-6).all()) is expected


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer) + 3
    tokenizer.add_tokens([f"added{i}" for i in range(4)])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelLoadError, match=rf"table of {size + 1} rows \(for 'added3'\), but the model's has {size}"):
        Embedder.load(tmp_path / "model", device="cpu")


def test_placeholders_beyond_the_table_are_read_as_texts(folder: Path, tmp_path: Path) -> None:
    """Such as those of sound in a model that has none."""
    shutil.copytree(folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer) + 3
    tokenizer.add_tokens([f"<|pad{i}|>" for i in range(3)])
    tokenizer.save_pretrained(tmp_path / "model")
    extra = {"audio_token": "<|audio|>"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model", extra_special_tokens=extra)
    tokenizer.save_pretrained(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids("<|audio|>") == size

    embedder = Embedder.load(tmp_path / "model", device="cpu")
    text = "listen to <|audio|> again"
    assert max(embedder.processor.text.encode(text)) < size
    assert np.isfinite(embedder.encode([text])).all()


def test_names_without_prefix_and_head(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bare")
    file = tmp_path / "bare" / "model.safetensors"
    tensors = {key.removeprefix("model."): value for key, value in load_file(file).items() if "lm_head" not in key}
    save_file(tensors, file, {"format": "pt"})
    edit(tmp_path / "bare" / "config.json", architectures=["Qwen3VLModel"])
    found = Embedder.load(tmp_path / "bare", device="cpu").encode(TEXTS)
    assert np.abs(found - Embedder.load(folder, device="cpu").encode(TEXTS)).max() == 0.0

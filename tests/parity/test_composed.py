"""Composed models against transformers' own encoders and plain linear algebra; their folders, read back."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from fairseq2.utils.structured import StandardValueConverter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.parity.test_bert import hf_configs as bert_configs
from tests.parity.test_bert import make_hf as make_bert
from tests.parity.test_bert import make_inputs
from vembed_fs2 import Embedder, load_model
from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.embedding.model import EncoderBatch
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.hub.find import ModelSource
from vembed_fs2.hub.load import load_processor
from vembed_fs2.hub.towers import load_towers, resolve_towers
from vembed_fs2.models.composed import COMPOSED_FAMILY, ComposedConfig, ComposedModel
from vembed_fs2.resolver import get_resolver

CPU = torch.device("cpu")


def compose(values: dict[str, Any]) -> tuple[ComposedModel, ComposedConfig]:
    """The model that the train recipe makes of `model.config_overrides`, before its first step."""
    config = StandardValueConverter().structure(resolve_towers(ComposedConfig(), values), ComposedConfig)
    family = get_resolver().resolve(ModelFamily, key=COMPOSED_FAMILY)
    gangs = create_fake_gangs(CPU)
    model = family.create_new_model(config, gangs, torch.float32, meta=False, init_rank0_only=False)
    assert isinstance(model, ComposedModel)
    load_towers(model, gangs)
    return model.eval(), config


@st.composite
def projections(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["linear", "mlp"]))
    values = {"kind": kind, "bias": draw(st.booleans()), "dropout_p": draw(st.sampled_from([0.0, 0.3]))}
    if kind == "mlp":
        values["hidden_dim"] = draw(st.sampled_from([None, 1, 5]))
        values["activation"] = draw(st.sampled_from(["gelu", "relu", "tanh"]))
    return values


@st.composite
def image_encoders(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    heads = draw(st.integers(1, 3))
    patch = draw(st.integers(2, 5))
    values = {
        "hidden_size": 4 * heads * draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "image_size": patch * draw(st.integers(1, 4)),
        "patch_size": patch,
        "hidden_act": draw(st.sampled_from(["gelu", "quick_gelu", "relu"])),
    }
    return draw(st.sampled_from(["clip", "dinov2", "vit"])), values


def make_image_encoder(kind: str, values: dict[str, Any]) -> transformers.PreTrainedModel:
    if kind == "clip":
        inner = {"intermediate_size": 12, **values}
        text = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        config = transformers.CLIPConfig(
            vision_config=inner, text_config={**text, "vocab_size": 20, "eos_token_id": 19}, projection_dim=6
        )
        model = transformers.CLIPModel(config)
    elif kind == "dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**values, mlp_ratio=2))
    else:
        model = transformers.ViTModel(transformers.ViTConfig(intermediate_size=12, **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def encode_image(model: transformers.PreTrainedModel, pixels: Tensor) -> Tensor:
    if isinstance(model, transformers.CLIPModel):
        return model.get_image_features(pixels)
    return model(pixels).last_hidden_state[:, 0]


def encode_text(model: transformers.BertModel, ids: Tensor, mask: Tensor, types: Tensor, pooling: str) -> Tensor:
    states = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    return torch.stack([row[m].mean(0) for row, m in zip(states, mask)])


def project(x: Tensor, state: dict[str, Tensor], prefix: str, activation: str) -> Tensor:
    for name in ("inner_proj", "output_proj"):
        weight, bias = (state.get(f"{prefix}.projection.{name}.{part}") for part in ("weight", "bias"))
        if weight is not None:
            x = x @ weight.T + (0 if bias is None else bias)
            x = create_activation(activation)(x) if name == "inner_proj" else x
    return x


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(
    bert=bert_configs(),
    image=image_encoders(),
    text_projection=projections(),
    image_projection=projections(),
    pooling=st.sampled_from(["mean", "cls"]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    embedding_dim=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_embeddings_are_projections_of_those_of_transformers(
    bert: dict[str, Any],
    image: tuple[str, dict[str, Any]],
    text_projection: dict[str, Any],
    image_projection: dict[str, Any],
    pooling: str,
    lengths: list[int],
    embedding_dim: int,
    seed: int,
) -> None:
    hf_text = make_bert(bert, seed=seed)
    hf_image = make_image_encoder(*image)
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, part) for part in ("text", "image")]
        for hf, folder in zip((hf_text, hf_image), folders):
            hf.save_pretrained(folder)
        model, _ = compose(
            {
                "text": {
                    "path": str(folders[0]),
                    "projection": text_projection,
                    "config": {"head": {"pooling": pooling}},
                },
                "image": {"path": str(folders[1]), "projection": image_projection, "config": image_head(image[0])},
                "embedding_dim": embedding_dim,
            }
        )
    ids, mask, types = make_inputs(hf_text, lengths)
    pixels = torch.randn(3, 3, image[1]["image_size"], image[1]["image_size"])
    state = model.state_dict()
    with torch.no_grad():
        expected = encode_text(hf_text, ids, mask, types, pooling)
        expected = project(expected, state, "text", text_projection.get("activation", "linear"))
        got = model(EncoderBatch.of_text(ids, mask, types)).values
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        expected = project(encode_image(hf_image, pixels), state, "image", image_projection.get("activation", "linear"))
        got = model(EncoderBatch.of_images(pixels)).values
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def image_head(kind: str) -> dict[str, Any]:
    return {} if kind == "clip" else {"head": {"pooling": "cls"}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a BERT with its tokenizer, and of a CLIP and a DINOv2 with their image processors."""
    root = tmp_path_factory.mktemp("folders")
    text = root / "bert"
    make_bert(
        {
            "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 16,
        }
    ).save_pretrained(text)  # fmt: skip
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "red", "green", "dog", "cat", "the"]
    text.joinpath("vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(text / "vocab.txt"), model_max_length=16).save_pretrained(text)
    found = {"bert": text}
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4, "hidden_size": 16}
    for kind in ("clip", "dinov2"):
        found[kind] = root / kind
        make_image_encoder(kind, {**sizes, "hidden_act": "gelu"}).save_pretrained(found[kind])
    transformers.CLIPImageProcessor(size=8, crop_size=8).save_pretrained(found["clip"])
    transformers.BitImageProcessor(size={"shortest_edge": 9}, crop_size=8).save_pretrained(found["dinov2"])
    return found


def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    shapes = {"RGB": (9, 13, 3), "L": (20, 11), "RGBA": (8, 8, 4)}
    found = [Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8), mode) for mode, shape in shapes.items()]
    return [*found, found[0].convert("P")]


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_exported_folder_needs_nothing_else(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    copies = {name: shutil.copytree(folders[name], tmp_path / name) for name in ("bert", kind)}
    model, config = compose(
        {
            "text": {"path": str(copies["bert"]), "projection": {"kind": "mlp", "dropout_p": 0.2}},
            "image": {"path": str(copies[kind]), "freeze": "all"},
            "embedding_dim": 7,
        }
    )
    processor = load_processor(model, copies["bert"], copies[kind])
    embedder = Embedder(model, processor, ModelSource("new", COMPOSED_FAMILY, config, tmp_path, tmp_path))
    inputs = ["a red dog", "the green cat", *pictures(), {"text": "a cat", "image": pictures()[0]}]
    expected = embedder.encode(inputs)
    embedder.save_hf(tmp_path / "out")
    for copy in copies.values():
        shutil.rmtree(copy)

    loaded = Embedder.load(tmp_path / "out")
    np.testing.assert_array_equal(loaded.encode(inputs), expected)
    values = json.loads(tmp_path.joinpath("out", "config.json").read_text())
    assert values["model_type"] == "vembed_composed"
    assert str(tmp_path) not in json.dumps(values)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())

    with pytest.raises(VembedError, match="cannot be written for sentence-transformers"):
        loaded.save_sentence_transformers(tmp_path / "other")

    # Nor does a second export differ from the first.
    loaded.save_hf(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        assert tmp_path.joinpath("again", name).read_bytes() == tmp_path.joinpath("out", name).read_bytes()
    assert isinstance(load_model(tmp_path / "again"), ComposedModel)


def test_processors_are_those_of_the_two_folders(folders: dict[str, Path]) -> None:
    model, _ = compose({"text": {"path": str(folders["bert"])}, "image": {"path": str(folders["dinov2"])}})
    processor = load_processor(model, folders["bert"], folders["dinov2"])
    assert processor.text is not None
    assert processor.image is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    texts = ["a red dog", "the green cat and a dog"]
    expected = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(processor.text(texts).input_ids, expected["input_ids"])
    slow = transformers.BitImageProcessor.from_pretrained(folders["dinov2"])
    images = [image.convert("RGB") for image in pictures()]
    expected = slow(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor.image(pictures()), expected, rtol=0, atol=1e-6)
    assert processor.tokens_per_image == model.tokens_per_image == 5


def test_checkpoint_that_does_not_fit_is_refused(folders: dict[str, Path]) -> None:
    values = {"text": {"path": str(folders["bert"])}, "image": {"path": str(folders["clip"])}}
    for own, error in (({"num_layers": 1}, "unexpected: encoder.layers.1."), ({"num_layers": 3}, "are missing")):
        with pytest.raises(ModelLoadError, match=error):
            compose({**values, "text": {**values["text"], "config": own}})

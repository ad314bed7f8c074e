"""Late interaction is a head of any family: vectors of tokens, of patches, and of both in one space."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq2.utils.structured import StandardValueConverter
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from tests.distributed.steps import BERT, CLIP, create_model, images, texts
from tests.unit.embedding.test_multi_vector import naive
from tests.unit.embedding.test_multi_vector import write_folder as write_text_folder
from vembed_fs2.demo.images import write_model_folder
from vembed_fs2.embedding.head import DenseConfig, HeadConfig, ImageHeadConfig, pool
from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.errors import ConfigError, DataError, VembedError
from vembed_fs2.evaluation.search import maxsim_scores
from vembed_fs2.files import write_json
from vembed_fs2.formats.folder import IMAGE_HEAD_FILE
from vembed_fs2.inference.embedder import Embedder
from vembed_fs2.models.clip import ClipConfig
from vembed_fs2.models.composed import ComposedConfig, ProjectionConfig, TowerConfig
from vembed_fs2.models.eva import EvaConfig, EvaVisionConfig
from vembed_fs2.models.family import config_errors
from vembed_fs2.models.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from vembed_fs2.models.vit import VitCheckpointFormat, VitConfig

LATE = HeadConfig(pooling="none")

_SIZES: dict[str, Any] = {"model_dim": 12, "num_layers": 2, "num_attn_heads": 3, "ffn_inner_dim": 16}

_TEXT: dict[str, Any] = {**_SIZES, "vocab_size": 50, "max_seq_len": 16}

SIGLIP = SiglipConfig(
    text=SiglipTextConfig(**_TEXT, projection_dim=12),
    vision=SiglipVisionConfig(**_SIZES, image_size=8, patch_size=4, num_patches=4),
)

EVA = EvaConfig(
    text=CLIP.text,
    vision=EvaVisionConfig(**_SIZES, image_size=8, patch_size=4),
    projection_dim=10,
)

COMPOSED = ComposedConfig(
    text=TowerConfig(family="vembed_bert", config=replace(BERT, head=LATE)),
    image=TowerConfig(family="vembed_clip", config=replace(CLIP, head=LATE)),
    embedding_dim=10,
)

DUAL: dict[str, Any] = {
    "clip": replace(CLIP, head=LATE),
    "eva": replace(EVA, head=LATE),
    "siglip": replace(SIGLIP, head=LATE),
    "naflex": replace(SIGLIP, naflex=True, head=LATE),
    "composed": COMPOSED,
}


def pictures(config: Any, num: int) -> EncoderBatch:
    """Images of one size, or of several shapes if the model takes those."""
    if not getattr(config, "naflex", False):
        return images(num, 0)
    shapes = torch.tensor([[2, 2], [1, 3], [1, 1], [2, 1]])[:num]
    mask = torch.arange(4) < shapes.prod(1)[:, None]
    return EncoderBatch.of_patches(torch.randn(num, 4, 48), mask, shapes)


def trained_without_gradient(model: EmbeddingModel) -> set[str]:
    skipped = {"logit_scale", "logit_bias"}
    return {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and n not in skipped}


@pytest.mark.parametrize("name", DUAL)
def test_texts_and_images_of_one_model_have_vectors_each(name: str) -> None:
    model = create_model(DUAL[name]).eval()
    text, image = texts(4, 0), pictures(DUAL[name], 4)
    assert text.text is not None
    assert (model.similarity, model.is_multi_vector, model.modalities) == ("maxsim", True, {"text", "image"})
    found, seen = model(text), model(image)
    for output in (found, seen):
        assert output.values.size(2) == model.embedding_dim
        assert output.mask.shape == output.values.shape[:2]
    assert torch.equal(found.mask.sum(1), text.text.num_tokens())
    assert seen.mask.sum(1).tolist() == ([4, 3, 1, 2] if name == "naflex" else [4] * 4)

    # Whatever else is in the batch, and however wide it is.
    for i in range(4):
        for batch, output in ((text, found), (image, seen)):
            alone = model(batch.select([i]))
            torch.testing.assert_close(
                alone.values[0][alone.mask[0]], output.values[i][output.mask[i]], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("name", DUAL)
def test_everything_that_is_trained_has_a_gradient(name: str) -> None:
    model = create_model(DUAL[name])
    loss = model(texts(4, 0)).values.square().sum() + model(pictures(DUAL[name], 4)).values.square().sum()
    loss.backward()
    assert trained_without_gradient(model) == set()


def test_rows_of_texts_and_rows_of_images_in_one_batch() -> None:
    model = create_model(DUAL["clip"]).eval()
    text, image = texts(3, 0), images(2, 0)
    both = EncoderBatch.concat([text, image])
    mixed = both.select([3, 0, 4, 2, 1])
    found = model(mixed)
    for row, batch, idx in ((0, image, 0), (1, text, 0), (2, image, 1), (3, text, 2), (4, text, 1)):
        alone = model(batch.select([idx]))
        torch.testing.assert_close(found.values[row][found.mask[row]], alone.values[0][alone.mask[0]])
    text_and_image = EncoderBatch(2, text.select([0, 1]).text, image.images)
    with pytest.raises(DataError, match="must be one text or one image"):
        model(text_and_image)


@pytest.mark.parametrize("name", ["clip", "eva"])
def test_poolings_of_a_dual_encoder_look_at_its_projected_states(name: str) -> None:
    late = create_model(DUAL[name]).eval()
    text, image = texts(4, 0), images(4, 0)
    vectors, patches = late(text), late(image)
    dense = [DenseConfig(input_dim=2 * late.embedding_dim, output_dim=5)]
    config = replace(DUAL[name], head=HeadConfig(pooling=["mean", "max"], dense=dense, similarity="dot"))
    model = create_model(config).eval()
    model.load_state_dict(late.state_dict(), strict=False)
    assert (model.embedding_dim, model.similarity) == (5, "dot")

    def pooled(values: Tensor, mask: Tensor) -> Tensor:
        return model.head.dense[0](torch.cat([pool(values, mask, "mean"), pool(values, mask, "max")], dim=1))

    torch.testing.assert_close(model(text).values, pooled(vectors.values, vectors.mask), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(image).values, pooled(patches.values, patches.mask), rtol=1e-5, atol=1e-5)


def test_the_pooler_of_a_dual_encoder_is_its_own_pooling() -> None:
    for config in (CLIP, EVA, SIGLIP):
        plain = create_model(config).eval()
        model = create_model(replace(config, head=HeadConfig(pooling="pooler", normalize=False))).eval()
        model.load_state_dict(plain.state_dict())
        assert (plain.normalize, model.normalize) == (True, False)
        for batch in (texts(3, 0), images(3, 0)):
            assert torch.equal(model(batch).values, plain(batch).values)


def test_heads_of_dual_encoders_that_cannot_be_are_errors() -> None:
    for config in (CLIP, EVA, SIGLIP):
        assert config_errors(replace(config, head=HeadConfig(pooling="mean"))) == []
        errors = config_errors(replace(config, head=HeadConfig(pooling=["none", "mean"], gem_p=0.0)))
        assert any("'none' beside others" in error for error in errors)
        assert any("`head.gem_p` must be positive" in error for error in errors)
    (error,) = config_errors(replace(EVA, head=HeadConfig(pooling="cls")))
    assert "sees no other token" in error
    (error,) = config_errors(replace(EVA, head=HeadConfig(pooling="none", top_k=2)))
    assert "sees no other token" in error
    (error,) = config_errors(replace(SIGLIP, head=HeadConfig(pooling="cls")))
    assert "looks at the class token" in error


def test_encoders_of_a_composed_model_are_of_one_kind() -> None:
    mlp = ProjectionConfig(kind="mlp", hidden_dim=7)
    model = create_model(replace(COMPOSED, text=replace(COMPOSED.text, projection=mlp))).eval()
    text = texts(3, 0)
    found = model(text)
    vectors = model.text.backbone(text)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(found.values, model.text.projection(vectors.values))  # type: ignore[operator, union-attr]
    assert torch.equal(found.mask, vectors.mask)
    with pytest.raises(ConfigError) as caught:
        create_model(replace(COMPOSED, image=TowerConfig(family="vembed_clip", config=CLIP)))
    assert caught.value.errors == [
        "`text`: `config` must give one vector per text, but gives several: change its pooling."
    ]


# Folders


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "model"
    write_model_folder(folder)
    write_json(folder / IMAGE_HEAD_FILE, {"pooling": "none", "dense": []})
    return folder


def assert_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-5)


def test_embedder_of_a_text_family(tmp_path: Path) -> None:
    embedder = Embedder.load(write_text_folder(tmp_path / "bert", LATE), device="cpu")
    found = embedder.encode(["red green", "", "old new round square"])
    assert [vectors.shape for vectors in found] == [(4, 16), (2, 16), (6, 16)]
    assert embedder.similarity(found, found[:2]).shape == (3, 2)


def test_embedder_of_a_dual_encoder(clip_folder: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(clip_folder, device="cpu")
    inputs = ["a seven", picture(0), "a one and a two", picture(1)]
    found = embedder.encode(inputs)
    dim, patches = embedder.embedding_dim, embedder.model.tokens_per_image - 1
    assert [vectors.shape[1] for vectors in found] == [dim] * 4
    assert [len(vectors) for vectors in found[1::2]] == [patches] * 2
    for vectors in found:
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
    assert_same([embedder.encode(one) for one in inputs], found)
    queries, documents = found[::2], found[1::2]
    pairs = [[float((q @ d.T).max(1).sum()) for d in documents] for q in queries]
    np.testing.assert_allclose(embedder.similarity(queries, documents), pairs, rtol=1e-5)

    embedder.save_hf(tmp_path / "copy")
    again = Embedder.load(tmp_path / "copy", device="cpu")
    assert again.source.config == embedder.source.config
    assert_same(again.encode(inputs), found)
    with pytest.raises(VembedError, match="sentence-transformers has no place for the `head`"):
        embedder.save_sentence_transformers(tmp_path / "st")
    with pytest.raises(VembedError, match="open_clip has no place for the `head`"):
        embedder.save_open_clip(tmp_path / "open_clip")
    assert not (tmp_path / "st").exists()


def test_embedder_of_an_image_family_with_dense_layers(clip_folder: Path, tmp_path: Path) -> None:
    head = ImageHeadConfig(pooling="none", top_k=3, dense=[DenseConfig(input_dim=12, output_dim=5)])
    config = VitConfig(**_SIZES, image_size=16, patch_size=8, pooler=False, head=head)
    folder = tmp_path / "vit"
    VitCheckpointFormat().save(folder, dict(create_model(config).state_dict()), config)
    shutil.copy(clip_folder / "preprocessor_config.json", folder)
    write_json(folder / IMAGE_HEAD_FILE, asdict(head))
    embedder = Embedder.load(folder, device="cpu")
    assert embedder.source.config.head == head
    photos = [picture(i) for i in range(3)]
    found = embedder.encode(photos)
    assert [vectors.shape for vectors in found] == [(3, 5)] * 3
    embedder.save_hf(tmp_path / "copy")
    assert_same(Embedder.load(tmp_path / "copy", device="cpu").encode(photos), found)


def test_configuration_of_a_head_is_written_and_read() -> None:
    for head in (None, HeadConfig(pooling=["mean", "cls"], dense=[DenseConfig(input_dim=20, output_dim=5)])):
        config = replace(CLIP, head=head)
        values = StandardValueConverter().unstructure(config)
        assert StandardValueConverter().structure(values, ClipConfig) == config
    old = StandardValueConverter().unstructure(CLIP)
    del old["head"]  # type: ignore[attr-defined]
    assert StandardValueConverter().structure(old, ClipConfig) == CLIP


def test_maxsim_of_a_dual_encoder_is_the_definition() -> None:
    model = create_model(DUAL["clip"]).eval()
    with torch.no_grad():
        q, d = model(texts(3, 0)), model(images(2, 0))
    scores = maxsim_scores(q.values, d.values, q.mask, d.mask)
    expected = naive(normalize(q.values, dim=-1), normalize(d.values, dim=-1), q.mask, d.mask)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)

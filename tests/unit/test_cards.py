"""The packaged asset cards."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from fairseq2.assets import AssetCard, AssetStore
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from ruamel.yaml import YAML

from vembed_fs2.models.embedding import EmbeddingModel
from vembed_fs2.models.hub import find_model, get_resolver

# Embedding size, and the numbers of parameters that transformers counts (BERT's with the pooler).
CARDS = {
    "google_bert_base_uncased": (768, 109_482_240),
    "sentence_transformers_all_minilm_l6_v2": (384, 22_713_216),
    "sentence_transformers_all_minilm_l12_v2": (384, 33_360_000),
    "baai_bge_small_en_v15": (384, 33_360_000),
    "baai_bge_base_en_v15": (768, 109_482_240),
    "baai_bge_large_en_v15": (1024, 335_141_888),
    "intfloat_e5_small_v2": (384, 33_360_000),
    "intfloat_e5_base_v2": (768, 109_482_240),
    "intfloat_e5_large_v2": (1024, 335_141_888),
    "openai_clip_vit_base_patch32": (512, 151_277_313),
    "openai_clip_vit_base_patch16": (512, 149_620_737),
    "openai_clip_vit_large_patch14": (768, 427_616_513),
    "openai_clip_vit_large_patch14_336": (768, 427_944_193),
    "laion_clip_vit_base_patch32_laion2b": (512, 151_277_313),
    "laion_clip_vit_huge_patch14_laion2b": (1024, 986_109_441),
}


def card_of(name: str) -> AssetCard:
    return get_resolver().resolve(AssetStore).retrieve_card(name)


def test_all_cards_of_the_package_are_tested() -> None:
    files = resources.files("vembed_fs2.assets.cards").iterdir()
    cards = [c for f in files if f.name.endswith(".yaml") for c in YAML(typ="safe").load_all(f.read_text())]
    ours = [c["name"] for c in cards if c.get("model_family", "").startswith("vembed_")]
    assert sorted(ours) == sorted(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_a_card_names_an_architecture_of_the_right_size(name: str) -> None:
    resolver = get_resolver()
    card = card_of(name)
    family = resolver.resolve(ModelFamily, key=card.field("model_family").as_(str))
    assert card.field("model_arch").as_(str) in family.get_archs()
    uri = card.field("checkpoint").as_uri()
    assert uri.scheme == "hg"
    source = find_model(name)
    assert source.folder is None
    model = family.create_new_model(
        source.config, create_fake_gangs(torch.device("cpu")), torch.float32, init_rank0_only=False, meta=True
    )
    assert isinstance(model, EmbeddingModel)
    dim, size = CARDS[name]
    assert model.embedding_dim == dim
    # A pooler that nothing uses is kept in buffers.
    tensors = model.state_dict()
    assert all(t.is_meta for t in tensors.values())
    assert sum(t.numel() for t in tensors.values()) == size


def test_sizes_are_those_of_transformers() -> None:
    from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

    with torch.device("meta"):
        assert BertModel(BertConfig()).num_parameters() == CARDS["google_bert_base_uncased"][1]
        assert CLIPModel(CLIPConfig()).num_parameters() == CARDS["openai_clip_vit_base_patch32"][1]


@pytest.mark.parametrize(
    ("name", "max_length", "tokens"),
    [
        ("baai_bge_small_en_v15", 512, 1),
        ("openai_clip_vit_base_patch32", 77, 50),
        ("openai_clip_vit_large_patch14_336", 77, 577),
    ],
)
def test_models_say_how_long_their_inputs_are(name: str, max_length: int, tokens: int) -> None:
    source = find_model(name)
    family = get_resolver().resolve(ModelFamily, key=source.family)
    model = family.create_new_model(
        source.config, create_fake_gangs(torch.device("cpu")), torch.float32, init_rank0_only=False, meta=True
    )
    assert isinstance(model, EmbeddingModel)
    assert (model.max_text_length, model.tokens_per_image) == (max_length, tokens)

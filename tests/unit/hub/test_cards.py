"""The packaged asset cards."""

from __future__ import annotations

from importlib import resources

import pytest
import torch
from fairseq2.assets import AssetCard, AssetStore
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from ruamel.yaml import YAML

from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.hub.find import find_model
from vembed_fs2.resolver import get_resolver

# Embedding size, and the numbers of parameters that transformers counts (BERT's with the pooler, even if unused).
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
    "qwen_qwen3_embedding_0_6b": (1024, 595_776_512),
    "qwen_qwen3_embedding_4b": (2560, 4_021_774_336),
    "qwen_qwen3_embedding_8b": (4096, 7_567_295_488),
    "qwen_qwen3_vl_embedding_2b": (2048, 2_127_532_032),
    "qwen_qwen3_vl_embedding_8b": (4096, 8_144_793_840),
    "alibaba_gte_qwen2_1_5b_instruct": (1536, 1_543_268_864),
    "alibaba_gte_qwen2_7b_instruct": (3584, 7_069_121_024),
    "intfloat_e5_mistral_7b_instruct": (4096, 7_110_660_096),
    "facebookai_roberta_base": (768, 124_055_040),
    "facebookai_roberta_large": (1024, 354_310_144),
    "facebookai_xlm_roberta_base": (768, 277_453_056),
    "facebookai_xlm_roberta_large": (1024, 558_840_832),
    "sentence_transformers_all_distilroberta_v1": (768, 82_118_400),
    "intfloat_multilingual_e5_small": (384, 117_653_760),
    "intfloat_multilingual_e5_base": (768, 278_043_648),
    "intfloat_multilingual_e5_large": (1024, 559_890_432),
    "intfloat_multilingual_e5_large_instruct": (1024, 559_890_432),
    "baai_bge_m3": (1024, 567_754_752),
    "microsoft_mpnet_base": (768, 108_895_872),
    "sentence_transformers_all_mpnet_base_v2": (768, 109_486_464),
    "sentence_transformers_multi_qa_mpnet_base_dot_v1": (768, 109_486_464),
    "distilbert_base_uncased": (768, 66_362_880),
    "answerdotai_modernbert_base": (768, 149_014_272),
    "answerdotai_modernbert_large": (1024, 394_781_696),
    "nomic_modernbert_embed_base": (768, 149_014_272),
    "alibaba_gte_modernbert_base": (768, 149_014_272),
    "google_vit_base_patch16_224_in21k": (768, 86_389_248),
    "google_vit_large_patch16_224_in21k": (1024, 304_351_232),
    "facebook_vit_mae_base": (768, 85_798_656),
    "facebook_vit_mae_large": (1024, 303_301_632),
    "facebook_vit_mae_huge": (1280, 630_764_800),
    "facebook_dinov2_small": (384, 22_056_576),
    "facebook_dinov2_with_registers_small": (384, 22_058_112),
    "facebook_dinov2_base": (768, 86_580_480),
    "facebook_dinov2_with_registers_base": (768, 86_583_552),
    "facebook_dinov2_large": (1024, 304_368_640),
    "facebook_dinov2_with_registers_large": (1024, 304_372_736),
    "facebook_dinov2_giant": (1536, 1_136_480_768),
    "facebook_dinov2_with_registers_giant": (1536, 1_136_486_912),
    "facebook_dinov3_vits16_pretrain_lvd1689m": (384, 21_596_544),
    "facebook_dinov3_vits16plus_pretrain_lvd1689m": (384, 28_692_864),
    "facebook_dinov3_vitb16_pretrain_lvd1689m": (768, 85_660_416),
    "facebook_dinov3_vitl16_pretrain_lvd1689m": (1024, 303_129_600),
    "facebook_dinov3_vith16plus_pretrain_lvd1689m": (1280, 840_592_640),
    "facebook_dinov3_vit7b16_pretrain_lvd1689m": (4096, 6_716_035_072),
    "facebook_dinov3_vitl16_pretrain_sat493m": (1024, 303_129_600),
    "facebook_dinov3_vit7b16_pretrain_sat493m": (4096, 6_716_035_072),
    "openai_clip_vit_base_patch32": (512, 151_277_313),
    "openai_clip_vit_base_patch16": (512, 149_620_737),
    "openai_clip_vit_large_patch14": (768, 427_616_513),
    "openai_clip_vit_large_patch14_336": (768, 427_944_193),
    "google_siglip_base_patch16_224": (768, 203_155_970),
    "google_siglip_base_patch16_256": (768, 203_202_050),
    "google_siglip_base_patch16_384": (768, 203_447_810),
    "google_siglip_base_patch16_512": (768, 203_791_874),
    "google_siglip_base_patch16_256_multilingual": (768, 370_626_050),
    "google_siglip_large_patch16_256": (1024, 652_150_786),
    "google_siglip_large_patch16_384": (1024, 652_478_466),
    "google_siglip_so400m_patch14_224": (1152, 877_360_306),
    "google_siglip_so400m_patch14_384": (1152, 877_960_498),
    "google_siglip2_base_patch32_256": (768, 376_856_066),
    "google_siglip2_base_patch16_224": (768, 375_187_970),
    "google_siglip2_base_patch16_256": (768, 375_234_050),
    "google_siglip2_base_patch16_384": (768, 375_479_810),
    "google_siglip2_base_patch16_512": (768, 375_823_874),
    "google_siglip2_large_patch16_256": (1024, 881_526_786),
    "google_siglip2_large_patch16_384": (1024, 881_854_466),
    "google_siglip2_large_patch16_512": (1024, 882_313_218),
    "google_siglip2_so400m_patch14_224": (1152, 1_135_463_602),
    "google_siglip2_so400m_patch14_384": (1152, 1_136_008_498),
    "google_siglip2_so400m_patch16_256": (1152, 1_135_670_962),
    "google_siglip2_so400m_patch16_384": (1152, 1_136_039_602),
    "google_siglip2_so400m_patch16_512": (1152, 1_136_555_698),
    "google_siglip2_giant_opt_patch16_256": (1536, 1_871_393_906),
    "google_siglip2_giant_opt_patch16_384": (1536, 1_871_885_426),
    "google_siglip2_base_patch16_naflex": (768, 375_234_050),
    "google_siglip2_so400m_patch16_naflex": (1152, 1_135_670_962),
    "laion_clip_vit_base_patch32_laion2b": (512, 151_277_313),
    "laion_clip_vit_huge_patch14_laion2b": (1024, 986_109_441),
    "timm_eva02_base_patch16_clip_224_merged2b": (512, 149_691_137),
    "timm_eva02_large_patch14_clip_224_merged2b": (768, 427_755_457),
    "timm_eva02_large_patch14_clip_336_merged2b": (768, 428_083_137),
    "timm_eva_giant_patch14_clip_224_laion400m": (1024, 1_136_435_841),
    "timm_eva_giant_patch14_plus_clip_224_merged2b": (1024, 1_366_621_569),
    "timm_eva02_enormous_patch14_clip_224_laion2b": (1024, 4_704_589_569),
    "timm_eva02_enormous_patch14_plus_clip_224_laion2b": (1024, 5_044_889_089),
    "laion_clip_vit_base_patch32_datacomp_xl": (512, 151_277_313),
    "laion_clip_vit_base_patch32_256_datacomp": (512, 151_288_833),
    "laion_clip_vit_base_patch16_datacomp_xl": (512, 149_620_737),
    "laion_clip_vit_large_patch14_datacomp_xl": (768, 427_616_513),
    "apple_dfn2b_clip_vit_base_patch16": (512, 149_620_737),
    "apple_dfn2b_clip_vit_large_patch14": (768, 427_616_513),
    "apple_dfn5b_clip_vit_huge_patch14": (1024, 986_109_441),
    "apple_dfn5b_clip_vit_huge_patch14_378": (1024, 986_714_881),
    "facebook_metaclip_b32_400m": (512, 151_277_313),
    "facebook_metaclip_b16_400m": (512, 149_620_737),
    "facebook_metaclip_l14_400m": (768, 427_616_513),
    "facebook_metaclip_h14_fullcc2_5b": (1024, 986_109_441),
    "ucsc_vlaa_clipa_vit_large_patch14_datacomp1b": (768, 414_210_561),
    "ucsc_vlaa_clipa_vit_huge_patch14_datacomp1b": (1024, 968_235_009),
}


def card_of(name: str) -> AssetCard:
    return get_resolver().resolve(AssetStore).retrieve_card(name)


def test_all_cards_of_the_package_are_tested() -> None:
    files = resources.files("vembed_fs2.assets.cards").iterdir()
    cards = [c for f in files if f.name.endswith(".yaml") for c in YAML(typ="safe").load_all(f.read_text())]
    ours = [c["name"] for c in cards if c.get("model_family", "").startswith("vembed_")]
    assert sorted(ours) == sorted(CARDS)


_SIZES: dict[str, tuple[int, int]] = {}
"""By family and configuration, which several cards may have in common."""


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
    key = f"{family.name} {source.config}"
    if key not in _SIZES:
        model = family.create_new_model(
            source.config, create_fake_gangs(torch.device("cpu")), torch.float32, init_rank0_only=False, meta=True
        )
        assert isinstance(model, EmbeddingModel)
        assert all(p.is_meta for p in model.parameters())
        _SIZES[key] = model.embedding_dim, sum(p.numel() for p in model.parameters())
    assert _SIZES[key] == CARDS[name]


def test_sizes_are_those_of_transformers() -> None:
    from transformers import (
        BertConfig,
        BertModel,
        CLIPConfig,
        CLIPModel,
        DistilBertConfig,
        DistilBertModel,
        ModernBertConfig,
        ModernBertModel,
        MPNetConfig,
        MPNetModel,
        XLMRobertaConfig,
        XLMRobertaModel,
    )

    with torch.device("meta"):
        assert BertModel(BertConfig()).num_parameters() == CARDS["google_bert_base_uncased"][1]
        assert DistilBertModel(DistilBertConfig()).num_parameters() == CARDS["distilbert_base_uncased"][1]
        assert ModernBertModel(ModernBertConfig()).num_parameters() == CARDS["answerdotai_modernbert_base"][1]
        mpnet = MPNetConfig(max_position_embeddings=514)
        assert MPNetModel(mpnet).num_parameters() == CARDS["sentence_transformers_all_mpnet_base_v2"][1]
        xlm = XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1)
        assert XLMRobertaModel(xlm).num_parameters() == CARDS["intfloat_multilingual_e5_base"][1]
        assert CLIPModel(CLIPConfig()).num_parameters() == CARDS["openai_clip_vit_base_patch32"][1]


@pytest.mark.parametrize(
    ("name", "max_length", "tokens"),
    [
        ("baai_bge_small_en_v15", 512, 1),
        ("baai_bge_m3", 8192, 1),
        ("sentence_transformers_all_mpnet_base_v2", 512, 1),
        ("answerdotai_modernbert_base", 8192, 1),
        ("qwen_qwen3_embedding_0_6b", 32768, 1),
        ("openai_clip_vit_base_patch32", 77, 50),
        ("openai_clip_vit_large_patch14_336", 77, 577),
        ("google_siglip_so400m_patch14_224", 16, 256),
        ("google_siglip2_base_patch16_naflex", 64, 256),
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

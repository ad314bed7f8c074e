"""What is wrong with a configuration is said in the same words by every family, all of it at once."""

from __future__ import annotations

import pytest

from vembed_fs2.errors import ConfigError
from vembed_fs2.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from vembed_fs2.models.clip.factory import create_clip_model
from vembed_fs2.models.eva import EvaConfig, EvaVisionConfig
from vembed_fs2.models.eva.factory import create_eva_model
from vembed_fs2.models.siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from vembed_fs2.models.siglip.factory import create_siglip_model


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ClipTextConfig(num_layers=0), "num_layers"),
        (ClipVisionConfig(num_channels=0), "num_channels"),
        (ClipConfig(projection_dim=0), "projection_dim"),
        (SiglipTextConfig(vocab_size=0), "vocab_size"),
        (SiglipVisionConfig(num_patches=0), "num_patches"),
        (EvaVisionConfig(rope_ref_size=0), "rope_ref_size"),
    ],
)
def test_a_size_that_is_not_positive(
    config: ClipConfig | ClipTextConfig | ClipVisionConfig | SiglipTextConfig | SiglipVisionConfig | EvaVisionConfig,
    field: str,
) -> None:
    assert list(config.validate().errors) == [f"`{field}` must be positive, but is 0 instead."]


def test_all_errors_of_a_tower_are_listed() -> None:
    config = ClipTextConfig(
        model_dim=30, num_attn_heads=4, layer_norm_eps=-1.0, init_range=-1.0, attn_dropout_p=1.0, activation="no"
    )

    errors = list(config.validate().errors)

    assert errors[:4] == [
        "`model_dim` must be a multiple of `num_attn_heads` (4), but is 30 instead.",
        "`attn_dropout_p` must be in [0, 1), but is 1.0 instead.",
        "`layer_norm_eps` must not be negative, but is -1.0 instead.",
        "`init_range` must not be negative, but is -1.0 instead.",
    ]
    assert len(errors) == 5
    assert "`activation`" in errors[4]


def test_no_model_is_made_of_a_configuration_that_is_not_valid() -> None:
    with pytest.raises(
        ConfigError, match=r"The CLIP configuration is not valid:\n.*`text`: `vocab_size` must be positive"
    ):
        create_clip_model(ClipConfig(text=ClipTextConfig(vocab_size=0)))

    with pytest.raises(ConfigError, match="The SigLIP configuration is not valid"):
        create_siglip_model(SiglipConfig(text=None, vision=None))

    with pytest.raises(ConfigError, match="The EVA-CLIP configuration is not valid"):
        create_eva_model(EvaConfig(vision=EvaVisionConfig(rope_ref_size=0)))

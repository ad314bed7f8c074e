"""How the modules of CLIP models are put together."""

from __future__ import annotations

from fairseq2.nn import Linear, ResidualConnect

from vembed_fs2.models.clip.config import ClipConfig, ClipTextConfig, ClipTowerConfig
from vembed_fs2.models.clip.model import ClipModel, ClipTextTower, ClipVisionFrontend, ClipVisionTower
from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.dual import TowerBuilder, create_text_frontend
from vembed_fs2.models.common.factory import ModelFactory, create_embedding, normal_init
from vembed_fs2.models.common.vision import BranchResidual, LayerScale, PatchProjection, as_pair


class ClipFactory(ModelFactory[ClipConfig]):
    """Creates the modules of a CLIP model."""

    def create_model(self) -> ClipModel:
        config = self._config
        text = create_text_tower(config.text, config.projection_dim)

        model = ClipModel(
            text, self.create_vision_tower(), config.logit_scale_init, config.train_logit_scale, config.head
        )
        model.tokens_per_image = config.vision.num_patches + 1
        model.image_shape = (config.vision.num_channels, *as_pair(config.vision.image_size))

        return model

    def create_vision_tower(self) -> ClipVisionTower:
        config = self._config.vision
        builder = _create_builder(config)
        encoder = builder.create_encoder(norm=False)

        return ClipVisionTower(
            self.create_vision_frontend(builder),
            encoder,
            builder.create_layer_norm(),
            _create_projection(config.model_dim, self._config.projection_dim),
            pooling=config.pooling,
            norm_after_pooling=config.norm_after_pooling,
        )

    def create_vision_frontend(self, builder: TowerBuilder) -> ClipVisionFrontend:
        config = self._config.vision
        std = config.init_range * config.init_factor

        # fairseq2's patch extractor always has a bias, and CLIP's has none.
        patch_proj = PatchProjection(
            config.num_channels, config.model_dim, config.patch_size, bias=False, init_fn=normal_init(std)
        )
        pos_embed = create_embedding(config.num_patches + 1, config.model_dim, std)

        return ClipVisionFrontend(
            patch_proj,
            pos_embed,
            builder.create_layer_norm() if config.pre_norm else None,
            config.model_dim**-0.5 * config.init_factor,
            grid=config.grid,
            patch_dropout_p=config.patch_dropout_p,
        )


def create_text_tower(config: ClipTextConfig, projection_dim: int) -> ClipTextTower:
    """Create the text Transformer of CLIP and of models that share it.

    :param projection_dim: the size of embeddings.
    """
    frontend = create_text_frontend(
        config.vocab_size, config.max_seq_len, config.model_dim, std=0.02 * config.init_factor
    )

    return ClipTextTower(
        frontend,
        _create_builder(config, causal=config.causal).create_encoder(norm=True),
        _create_projection(config.model_dim, projection_dim, bias=config.proj_bias),
        config.eos_idx,
        pooling=config.pooling,
        pad_id=config.pad_idx if config.sees_padding else None,
    )


def create_clip_model(config: ClipConfig) -> ClipModel:
    """Create a CLIP model with initial weights as transformers draws them.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "CLIP")

    return ClipFactory(config).create_model()


def _create_builder(config: ClipTowerConfig, *, causal: bool = False) -> TowerBuilder:
    depth_scale = (2 * config.num_layers) ** -0.5
    std = config.model_dim**-0.5 * config.init_factor
    inner_std = (2 * config.model_dim) ** -0.5 * config.init_factor

    def init_ffn(proj: Linear) -> None:
        # One function initialises both; the input size tells them apart.
        normal_init(inner_std if proj.input_dim == config.model_dim else std * depth_scale)(proj)

    def create_residual() -> ResidualConnect | None:
        if config.layer_scale_init is None:
            return None

        return BranchResidual(LayerScale(config.model_dim, config.layer_scale_init))

    return TowerBuilder(
        config,
        init_qkv=normal_init(std * depth_scale),
        init_output=normal_init(std),
        init_ffn=init_ffn,
        causal=causal,
        create_residual=create_residual,
    )


def _create_projection(model_dim: int, projection_dim: int, *, bias: bool = False) -> Linear:
    return Linear(model_dim, projection_dim, bias=bias, init_fn=normal_init(model_dim**-0.5))

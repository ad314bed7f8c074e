"""How the modules of Qwen3-VL models are put together."""

from __future__ import annotations

from fairseq2.models.transformer import StandardMultiheadAttention, StandardTransformerEncoderLayer
from fairseq2.nn import ColumnShardedLinear, Linear, RowShardedLinear, StandardLayerNorm

from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.decoder import DecoderFactory
from vembed_fs2.models.common.factory import ModelFactory, create_embedding, normal_init
from vembed_fs2.models.common.layers import create_ffn, create_layer
from vembed_fs2.models.common.rotary import RotaryPositions
from vembed_fs2.models.qwen3_vl.config import Qwen3VLConfig, VisionConfig
from vembed_fs2.models.qwen3_vl.model import DeepStackDecoder, Qwen3VLModel
from vembed_fs2.models.qwen3_vl.vision import PatchMerger, VisionTower, create_patch_sdpa


class Qwen3VLFactory(DecoderFactory[Qwen3VLConfig]):
    """Creates the modules of a Qwen3-VL model."""

    def create_model(self) -> Qwen3VLModel:
        config = self._config

        layers = [self.create_decoder_layer(idx) for idx in range(config.num_layers)]
        model = Qwen3VLModel(
            self.create_frontend(),
            VisionFactory(config.vision, config.model_dim).create_tower(),
            DeepStackDecoder(layers, self.create_layer_norm()),
            head_dim=config.attn_head_dim,
            rope_theta=config.rope_theta,
            mrope_section=config.mrope_section,
            visual_ids=[config.image_idx, config.video_idx],
            frame_ids=(config.vision_start_idx, config.vision_end_idx),
            patch_dim=config.vision.patch_dim,
        )
        model.set_head(config.head, config.model_dim)
        model.max_text_length = config.max_seq_len
        model.vocab_size = config.vocab_size

        return model


class VisionFactory(ModelFactory[VisionConfig]):
    """Creates the modules of the vision tower."""

    def __init__(self, config: VisionConfig, output_dim: int) -> None:
        """
        :param output_dim: the size of the decoder.
        """
        super().__init__(config)
        self._output_dim = output_dim

    def create_tower(self) -> VisionTower:
        config = self._config
        return VisionTower(
            Linear(config.patch_dim, config.model_dim, bias=True, init_fn=normal_init(config.init_std)),
            create_embedding(config.num_positions, config.model_dim, config.init_std),
            [self.create_layer() for _ in range(config.num_layers)],
            self.create_merger(norm_first=True),
            config.deepstack_layers,
            [self.create_merger(norm_first=False) for _ in config.deepstack_layers],
            head_dim=config.model_dim // config.num_attn_heads,
            merge_size=config.merge_size,
        )

    def create_layer(self) -> StandardTransformerEncoderLayer:
        config = self._config
        ffn = create_ffn(config.model_dim, config.ffn_inner_dim, config.activation, normal_init(config.init_std))
        return create_layer(self.create_self_attention(), ffn, lambda: self.create_layer_norm(config.model_dim))

    def create_self_attention(self) -> StandardMultiheadAttention:
        config = self._config
        return StandardMultiheadAttention(
            config.model_dim,
            config.num_attn_heads,
            create_patch_sdpa(),
            qkv_proj_init_fn=normal_init(config.init_std),
            pos_encoder=RotaryPositions(config.model_dim // config.num_attn_heads),
            output_proj_init_fn=normal_init(config.init_std),
        )

    def create_merger(self, *, norm_first: bool) -> PatchMerger:
        config = self._config
        square_dim = config.model_dim * config.merge_size**2
        init = normal_init(config.init_std)
        return PatchMerger(
            self.create_layer_norm(config.model_dim if norm_first else square_dim),
            ColumnShardedLinear(square_dim, square_dim, bias=True, gather_output=False, init_fn=init),
            RowShardedLinear(square_dim, self._output_dim, bias=True, scatter_input=False, init_fn=init),
            norm_first=norm_first,
        )

    def create_layer_norm(self, dim: int) -> StandardLayerNorm:
        return StandardLayerNorm(dim, bias=True, eps=1e-6)


def create_qwen3_vl_model(config: Qwen3VLConfig) -> Qwen3VLModel:
    """Create a Qwen3-VL model with initial weights as transformers draws them.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "Qwen3-VL")

    return Qwen3VLFactory(config).create_model()

"""How the modules of decoders of texts are put together."""

from __future__ import annotations

from dataclasses import asdict

from fairseq2.models.transformer import SDPA, StandardTransformerEncoder
from transformers import PretrainedConfig
from typing_extensions import override

from vembed_fs2.formats.rope import LENGTH
from vembed_fs2.models.common.attention import create_sdpa
from vembed_fs2.models.common.checks import require_valid
from vembed_fs2.models.common.decoder import DecoderFactory
from vembed_fs2.models.qwen3.config import Qwen3Config
from vembed_fs2.models.qwen3.model import Qwen3Model


class Qwen3Factory(DecoderFactory[Qwen3Config]):
    """Creates the modules of a decoder of texts."""

    def create_model(self) -> Qwen3Model:
        config = self._config

        model = Qwen3Model(
            self.create_frontend(),
            self.create_decoder(),
            head_dim=config.attn_head_dim,
            rope_theta=config.rope_theta,
            rope_scaling=self.create_rope_scaling(),
        )
        model.set_head(config.head, config.model_dim)
        model.max_text_length = config.max_seq_len
        model.vocab_size = config.vocab_size

        return model

    def create_decoder(self) -> StandardTransformerEncoder:
        layers = [self.create_decoder_layer(idx) for idx in range(self._config.num_layers)]
        return StandardTransformerEncoder(layers, self.create_layer_norm())

    @override
    def create_sdpa(self, idx: int) -> SDPA:
        config = self._config
        window = config.attn_window if idx in config.windowed_layers else None
        return create_sdpa(dropout_p=config.attn_dropout_p, causal=config.is_causal, window=window)

    def create_rope_scaling(self) -> PretrainedConfig | None:
        """What transformers' functions of stretched positions read; ``None`` if positions are not stretched."""
        config = self._config
        if config.rope_scaling is None:
            return None

        scaling = {key: value for key, value in asdict(config.rope_scaling).items() if value is not None}
        # Where the function of this kind looks for it.
        outside = {LENGTH: scaling.pop(LENGTH)} if scaling["rope_type"] == "longrope" and LENGTH in scaling else {}

        return PretrainedConfig(
            hidden_size=config.model_dim,
            num_attention_heads=config.num_attn_heads,
            head_dim=config.attn_head_dim,
            rope_theta=config.rope_theta,
            rope_scaling=scaling,
            max_position_embeddings=config.max_seq_len,
            **outside,
        )


def create_qwen3_model(config: Qwen3Config) -> Qwen3Model:
    """Create a decoder with initial weights as transformers draws them.

    :raises ConfigError: ``config`` is not valid.
    """
    require_valid(config, "Qwen3")

    return Qwen3Factory(config).create_model()

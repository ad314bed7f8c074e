"""EVA-CLIP checkpoints in our own layout; ``open_clip.py`` has open_clip's."""

from __future__ import annotations

from typing import Final

from fairseq2.models import ModelHubAccessor

from vembed_fs2.models.eva.config import EVA_FAMILY, EvaConfig
from vembed_fs2.models.eva.model import EvaModel
from vembed_fs2.models.family import PlainCheckpointFormat

# transformers has no class for these models.
EVA_FORMAT: Final = PlainCheckpointFormat(EVA_FAMILY, EvaConfig)

get_eva_model_hub = ModelHubAccessor(EVA_FAMILY, kls=EvaModel, config_kls=EvaConfig)

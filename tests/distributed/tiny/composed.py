from __future__ import annotations

from dataclasses import replace

from vembed_fs2.embedding.head import HeadConfig
from vembed_fs2.models.composed import ComposedConfig, ProjectionConfig, TowerConfig

from ..families import Case
from ..steps import BERT, CLIP, images, texts

TEXT = TowerConfig(family="vembed_bert", config=replace(BERT, logit_scale_init=None))

IMAGE = TowerConfig(family="vembed_clip", config=CLIP)

MLP = ProjectionConfig(kind="mlp", hidden_dim=20, bias=True, dropout_p=0.1)

BOTH_TRAINED = ComposedConfig(text=TEXT, image=IMAGE, embedding_dim=10, logit_scale_init=2.0)

IMAGE_LOCKED = replace(BOTH_TRAINED, text=replace(TEXT, projection=MLP), image=replace(IMAGE, freeze="all"))

PARTLY_FROZEN = replace(
    BOTH_TRAINED,
    text=replace(TEXT, freeze="all_but_last", trained_layers=1),
    image=replace(IMAGE, frozen_params=["vision.frontend."], projection=MLP),
)

LATE = HeadConfig(pooling="none")

VECTORS = replace(
    BOTH_TRAINED,
    text=replace(TEXT, config=replace(BERT, logit_scale_init=None, head=LATE), projection=MLP),
    image=replace(IMAGE, config=replace(CLIP, head=LATE)),
)

CASES = {
    "both towers trained": Case("vembed_composed", BOTH_TRAINED, texts, images),
    "image tower locked": Case("vembed_composed", IMAGE_LOCKED, texts, images),
    "vectors": Case("vembed_composed", VECTORS, texts, images),
    "towers partly frozen": Case("vembed_composed", PARTLY_FROZEN, images, texts),
}

"""Writers of the layouts of other libraries."""

from __future__ import annotations

from typing import Protocol

from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.hub.find import ModelSource
from vembed_fs2.processing.towers import TowerProcessor


class Exportable(Protocol):
    """The things that are written: a model with its configuration and its processor."""

    @property
    def model(self) -> EmbeddingModel: ...

    @property
    def processor(self) -> TowerProcessor: ...

    @property
    def source(self) -> ModelSource: ...

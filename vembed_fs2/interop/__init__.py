"""Writers of the layouts of other libraries."""

from __future__ import annotations

from typing import Any, Protocol

from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.formats.ranges import Ranges
from vembed_fs2.hub.find import ModelSource
from vembed_fs2.processing.processor import Processor


class Exportable(Protocol):
    """The things that are written: a model with its configuration and its processor."""

    @property
    def model(self) -> EmbeddingModel: ...

    @property
    def processor(self) -> Processor[Any]: ...

    @property
    def source(self) -> ModelSource: ...

    @property
    def ranges(self) -> Ranges | None: ...

    @property
    def truncate_dim(self) -> int | None: ...

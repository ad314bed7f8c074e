"""The configuration of wrapped models."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fairseq2.utils.validation import ValidationResult

from vembed_fs2.embedding.head import ImageHeadConfig
from vembed_fs2.embedding.model import EmbeddingModelConfig, HeadConfig
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.models.auto.backbone import Backbone, Code, find_backbone
from vembed_fs2.models.family import FALLBACK_FAMILY

AUTO_FAMILY: Final = FALLBACK_FAMILY


@dataclass(kw_only=True)
class AutoModelConfig(EmbeddingModelConfig):
    """The configuration of a model of transformers, and of what follows it."""

    hf_config: dict[str, object] = field(default_factory=dict)
    """The content of ``config.json``."""

    pooler: bool | None = None
    """Whether the model has the pooler of its class, if that is a choice; ``None`` leaves it to the class."""

    head: HeadConfig | None = None
    """
    What follows the states of texts. ``None`` is the default, also of a folder
    that says nothing of it: ``last`` for decoders, which see only what comes
    before a token, and ``mean`` for all others. Dual encoders have projections
    of their own instead.
    """

    image_head: ImageHeadConfig | None = None
    """
    What follows the states of images. ``None`` is the default: the model's own
    pooler, if it has one, else the class token, if it has one, else the mean.
    Dual encoders, texts included, have their own projections for ``pooler``.
    """

    trust_remote_code: bool = False
    """If ``True``, the model's own Python code may be run. It can do anything on your machine: read it before."""

    code_path: str | None = None
    """The folder of that code."""

    def code(self) -> Code | None:
        """The model's own code, if there is any."""
        return None if self.code_path is None else Code(Path(self.code_path), self.trust_remote_code)

    def backbone(self) -> Backbone:
        """Find the class of transformers.

        :raises ModelLoadError: there is none, or no embeddings can be made with it.
        """
        return find_backbone(self.hf_config, pooler=self.pooler, code=self.code())

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        try:
            backbone = self.backbone()
        except ModelLoadError as ex:
            result.add_error(str(ex))
            return result

        name = backbone.kls.__name__
        if self.head is not None and backbone.modalities != {"text"}:
            result.add_error(f"`head` must be null: transformers' {name} has no states of texts to pool.")
        is_pooler_of_dual = self.image_head is not None and self.image_head.is_pooler_alone and backbone.is_dual
        if self.image_head is not None and backbone.modalities != {"image"} and not is_pooler_of_dual:
            result.add_error(f"`image_head` must be null: transformers' {name} has no states of images to pool.")

        return result

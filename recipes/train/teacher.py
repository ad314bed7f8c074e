"""The teacher of a distillation: a frozen model whose embeddings the objective sees."""

from __future__ import annotations

from typing import Any, final

import torch
from fairseq2.gang import Gangs
from torch import Tensor

from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.errors import ConfigError
from vembed_fs2.hub.find import ModelSource, find_model
from vembed_fs2.hub.load import load_processor, load_source
from vembed_fs2.inference.encoder import Encoder
from vembed_fs2.processing.processor import Processor
from vembed_fs2.recipes.train.config import GradCacheSection, TeacherSection


@final
class Teacher:
    """Encodes rows in chunks, without graphs.

    Its weights are on every rank in full, also where the student's are sharded:
    ranks encode their own rows, and need not run the same number of chunks.
    """

    def __init__(self, model: EmbeddingModel, processor: Processor[Any], grad_cache: GradCacheSection) -> None:
        """:raises ConfigError: the model gives several vectors per row."""
        if model.is_multi_vector:
            raise ConfigError("a teacher must give one vector per row.", where="`teacher`")

        self.processor = processor
        self._model = model.requires_grad_(False).eval()
        self._encoder = Encoder(
            self._model, chunk_tokens=grad_cache.chunk_tokens, chunk_patches=grad_cache.chunk_patches
        )

    def encode(self, batch: EncoderBatch) -> Tensor:
        """Encode rows, longest first.

        *Returns:* float32, of unit length if the model's embeddings are meant to be. ``[N, T]``.
        """
        encoded = self._encoder.encode_batch(batch)
        rows = torch.tensor([row for rows, _ in encoded for row in rows])
        values = torch.cat([embeddings.values.float() for _, embeddings in encoded])

        ordered = torch.empty_like(values)
        ordered[rows.to(values.device)] = values

        return torch.nn.functional.normalize(ordered, dim=-1) if self._model.normalize else ordered


def find_teacher(section: TeacherSection) -> ModelSource:
    """Find the model that the configuration names.

    :raises ModelLoadError: there is none, or it is not supported.
    """
    return find_model(section.path or section.name or "")


def load_teacher(source: ModelSource, section: TeacherSection, grad_cache: GradCacheSection, gangs: Gangs) -> Teacher:
    """Load the teacher on every rank."""

    def load() -> Teacher:
        model = load_source(source, device=gangs.root.device, dtype=section.dtype)
        processor = load_processor(model, source.processor_folder(), max_length=section.max_length)
        return Teacher(model, processor, grad_cache)

    # One process downloads, the others find the files.
    teacher = load() if gangs.root.rank == 0 else None
    gangs.root.barrier()
    return teacher or load()

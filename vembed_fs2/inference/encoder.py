"""The loop that every part of the package encodes with: items in, embeddings out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any, Final, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch.nn import Module

from vembed_fs2.data.example import Item, Role
from vembed_fs2.embedding.batch import EncoderBatch
from vembed_fs2.embedding.model import EmbeddingModel, Embeddings
from vembed_fs2.gradcache import plan_chunks
from vembed_fs2.inference.prepare import PreparedWindows, cut_windows
from vembed_fs2.processing.processor import Processor

Encoded: TypeAlias = tuple[list[int], Embeddings]
"""The positions of some rows, and their embeddings."""

# Small enough for the caches of CPUs, larger for GPUs.
_CHUNK_TOKENS: Final = {"cpu": 1024, "cuda": 65536}


class Encoder:
    """A model that encodes without gradients, in evaluation mode.

    ::

        items -> windows -> batches (prepared in threads, one window ahead)
                               |
                            chunks of rows of similar cost -> model -> embeddings

    :param processor: makes batches of items; not needed for :meth:`encode_batch`.
    :param chunk_tokens: the most tokens per forward pass, with padding; by default, what suits the device.
    :param chunk_patches: the most patches per forward pass; if ``None``, patches count as tokens.
    :param autocast_dtype: the type that the model computes in; by default, the type of its weights, or of the
        autocast that the caller is in.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        processor: Processor[Any] | None = None,
        *,
        chunk_tokens: int | None = None,
        chunk_patches: int | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._processor = processor
        self._device = next(model.parameters()).device
        self._chunk_tokens = chunk_tokens or _CHUNK_TOKENS.get(self._device.type, _CHUNK_TOKENS["cpu"])
        self._chunk_patches = chunk_patches
        self._autocast_dtype = autocast_dtype

    def encode(
        self,
        items: Iterable[Item],
        *,
        role: Role | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        finish: Callable[[Embeddings], Embeddings] | None = None,
    ) -> Iterator[Encoded]:
        """Encode a stream of any length, in constant memory.

        A window of inputs is prepared while the window before is encoded, and
        yielded when all of it is encoded: between two results the model is in its
        own mode again, so that it may be trained there. Within a window, expensive
        rows come first.

        :param items: read in the caller's thread, up to one window ahead.
        :param role: the side that the inputs stand on.
        :param prompt: put before each text; the prompt of the role if ``None``.
        :param batch_size: the most rows per forward pass.
        :param finish: applied to the embeddings of each forward pass, for example to move them to the CPU.
        :returns: positions in ``items``, and their embeddings.
        :raises DataError: an input cannot be read. An error is raised as soon as
            it is found, even if inputs before it have not been yielded.
        """
        assert self._processor is not None

        offset = 0

        with PreparedWindows(cut_windows(items), self._processor, role=role, prompt=prompt) as batches:
            for batch in batches:
                encoded: list[Encoded] = []
                with self._computing():
                    for rows, embeddings in self._run(batch, batch_size):
                        finished = embeddings if finish is None else finish(embeddings)
                        encoded.append(([offset + row for row in rows], finished))
                        batches.check()

                offset += batch.num_rows
                del batch  # The next one takes its place in memory.
                yield from encoded

    def encode_batch(self, batch: EncoderBatch) -> list[Encoded]:
        """Encode the rows of a batch that is prepared already. *Returns:* positions in the batch, and embeddings."""
        with self._computing():
            return list(self._run(batch, None))

    def _run(self, batch: EncoderBatch, max_rows: int | None) -> Iterator[Encoded]:
        chunks = plan_chunks(batch.profile(), self._chunk_tokens, self._chunk_patches, max_rows=max_rows)

        for chunk in chunks:
            part = batch.select(chunk.rows)
            part.to(self._device)

            with torch.inference_mode():
                output = self._model(part)

            # Copies, because autograd refuses tensors that were made in inference mode.
            mask = None if output.mask is None else output.mask.clone()
            yield list(chunk.rows), Embeddings(output.values.clone(), mask)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Set the model and torch up. Once per window: autocast then casts the weights once per window."""
        with _evaluating(self._model), self._autocast():
            yield

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast_dtype)


_lock: Final = Lock()

_in_evaluation: Final[WeakKeyDictionary[Module, tuple[int, list[Module]]]] = WeakKeyDictionary()
"""How many threads encode with a model at this moment, and which of its modules were in training mode before."""


@contextmanager
def _evaluating(model: Module) -> Iterator[None]:
    """Put a model in evaluation mode. Only the last of several threads restores the mode."""
    with _lock:
        count, training = _in_evaluation.get(model, (0, []))
        if count == 0:
            training = [module for module in model.modules() if module.training]
            model.eval()
        _in_evaluation[model] = (count + 1, training)

    try:
        yield
    finally:
        with _lock:
            count, training = _in_evaluation.pop(model)
            if count > 1:
                _in_evaluation[model] = (count - 1, training)
            else:
                for module in training:
                    module.training = True

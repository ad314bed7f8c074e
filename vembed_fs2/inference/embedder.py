"""Inference: texts and images in, embeddings out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vembed_fs2.data.example import Item
from vembed_fs2.embedding.model import EmbeddingModel, Embeddings, EncoderBatch
from vembed_fs2.errors import DataError, VembedError
from vembed_fs2.gradcache import plan_chunks
from vembed_fs2.hub.find import ModelSource, find_model
from vembed_fs2.hub.load import load_source
from vembed_fs2.inference.similarity import Array, Embedded, compare_all, compare_pairs
from vembed_fs2.processing.processor import as_item
from vembed_fs2.processing.towers import TowerProcessor

Precision: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]

# Inputs are prepared this many at a time: sorted by length among themselves,
# and prepared while the window before them is encoded.
_WINDOW: Final = 2048

# The same where there are images, whose pixels take a thousand times the memory of a text.
_IMAGE_WINDOW: Final = 256

_ONE_INPUT: Final = (str, bytes, dict, Item, Path)
"""Inputs that are not several, although one can iterate over most of them."""

# Tokens in a batch; small enough for caches of CPUs, larger for GPUs.
_BATCH_TOKENS: Final = {"cpu": 1024, "cuda": 65536}


class Embedder:
    """A model with its processor.

    .. code:: python

        embedder = Embedder.load("sentence_transformers_all_minilm_l6_v2")
        vectors = embedder.encode(["a text", "another"])
    """

    def __init__(self, model: EmbeddingModel, processor: TowerProcessor, source: ModelSource) -> None:
        self.model = model
        self.processor = processor
        self.source = source
        self.autocast_dtype: torch.dtype | None = None
        """If set, the model computes in this type (``torch.bfloat16``); embeddings stay float32."""

    @staticmethod
    def load(
        name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> Embedder:
        """Load a card, a Hugging Face or sentence-transformers folder, a run folder or a checkpoint folder.

        :param device: where to compute; a GPU if there is one.
        :param max_length: overrides the model's longest text, in tokens.
        :param trust_remote_code: whether Python code that comes with the model may be run. It can do anything.
        :raises ModelLoadError: there is no such model, or it is broken.
        :raises VembedError: an option is not valid.
        """
        device = _find_device(device)
        if max_length is not None and max_length < 3:
            raise VembedError(f"`max_length` must be greater than or equal to 3, but is {max_length}.")
        source = find_model(name_or_path, trust_remote_code=trust_remote_code)
        model = load_source(source, device=device, dtype=dtype)
        processor = load_processor(model, source.processor_folder(), max_length=max_length)
        return Embedder(model, processor, source)

    @property
    def device(self) -> torch.device:
        """Where embeddings are computed."""
        return next(self.model.parameters()).device

    @property
    def embedding_dim(self) -> int:
        """The size of an embedding."""
        return self.model.embedding_dim

    def encode(
        self,
        inputs: object,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
        normalize_embeddings: bool | None = None,
        convert_to_tensor: bool = False,
    ) -> Any:
        """Encode inputs.

        :param inputs: one or a list of: str (text), PIL image, ``Path`` or bytes
            (image), dict with ``text``, ``image`` (one or a list), ``instruction``.
        :param prompt_name: the name of one of the model's prompts.
        :param prompt: a text put before each text; overrides ``prompt_name``.
        :param batch_size: the most inputs per forward pass; chosen by length if ``None``.
        :param truncate_dim: keep this many leading dimensions (Matryoshka).
        :param normalize_embeddings: scale each vector to unit length; ``None`` does what the model says.
        :returns: float32 ``[N, D]`` in input order (``[D]`` for one input);
            other types for other values of ``precision``. Of multi-vector
            models, a list of ``[L_i, D]`` in input order.
        :raises DataError: an input has neither a text nor an image, or cannot be read.
        :raises VembedError: an option is not valid, or there is no such prompt.
        """
        prefix = prompt if prompt is not None else self._prompt(prompt_name)
        self._check_options(batch_size, truncate_dim, precision)
        is_single = _is_single(inputs)
        items = [as_item(i) for i in ([inputs] if is_single else inputs)]  # type: ignore[attr-defined]
        unit = self.model.normalize if normalize_embeddings is None else normalize_embeddings
        finish = _Finish(truncate_dim or self.embedding_dim, unit, self._is_multi_vector and not convert_to_tensor)
        values = self._encode(items, prefix, batch_size, show_progress_bar, finish)
        if isinstance(values, list):
            vectors = values if convert_to_tensor else [v.numpy() for v in values]
            return vectors[0] if is_single else vectors
        if precision != "float32":
            values = torch.from_numpy(quantize(values.cpu().numpy(), precision))
        if is_single:
            values = values[0]
        return values if convert_to_tensor else values.cpu().numpy()

    def _check_options(self, batch_size: int | None, truncate_dim: int | None, precision: str) -> None:
        if batch_size is not None and batch_size < 1:
            raise VembedError(f"`batch_size` must be greater than or equal to 1, but is {batch_size}.")
        if truncate_dim is not None and not 1 <= truncate_dim <= self.embedding_dim:
            raise VembedError(f"`truncate_dim` must be between 1 and {self.embedding_dim}, but is {truncate_dim}.")
        if precision not in get_args(Precision):
            raise VembedError(f"`precision` must be one of {', '.join(get_args(Precision))}, but is {precision!r}.")
        if self._is_multi_vector and precision != "float32":
            raise VembedError(f"`precision` of a multi-vector model must be float32, but is {precision!r}.")

    def encode_query(self, inputs: object, prompt_name: str | None = None, **kwargs: Any) -> Any:
        """:meth:`encode` with the model's ``query`` prompt, if it has one."""
        return self.encode(inputs, self._role_prompt("query", prompt_name, kwargs), **kwargs)

    def encode_document(self, inputs: object, prompt_name: str | None = None, **kwargs: Any) -> Any:
        """:meth:`encode` with the model's ``document`` (or ``passage``, or ``corpus``) prompt, if it has one."""
        return self.encode(inputs, self._role_prompt("document", prompt_name, kwargs), **kwargs)

    def encode_stream(self, inputs: Iterable[object], **kwargs: Any) -> Iterator[Array]:
        """Encode inputs as they come; yields one embedding per input, in order, in constant memory.

        An embedding is ``[D]``, or ``[L, D]`` of multi-vector models.

        :param kwargs: those of :meth:`encode`, without the precisions ``int8`` and
            ``uint8``: the range of their values is that of all inputs.
        :raises DataError: ``inputs`` is one input.
        """
        if kwargs.get("precision") in ("int8", "uint8"):
            raise VembedError(f"`precision` must not be {kwargs['precision']!r} in a stream: its range is not known.")
        if isinstance(inputs, _ONE_INPUT):  # A string would be a stream of its letters.
            raise DataError("`inputs` must be a list or an iterator. For one input, use `encode`.")
        iterator = iter(inputs)
        while window := list(islice(iterator, _WINDOW)):
            yield from self.encode(window, **kwargs)

    def similarity(self, a: Embedded, b: Embedded) -> Any:
        """Compare all of ``a`` with all of ``b``, as the model's embeddings are compared. *Returns:* ``[N, M]``.

        Of multi-vector models, ``a`` are the queries: MaxSim sums over their
        vectors (see :func:`~vembed_fs2.evaluation.search.exact_search`).
        """
        return compare_all(a, b, self.model.similarity)

    def similarity_pairwise(self, a: Embedded, b: Embedded) -> Any:
        """Compare row by row. *Returns:* ``[N]``."""
        return compare_pairs(a, b, self.model.similarity)

    def save_hf(self, folder: str | Path) -> None:
        """Write a folder that transformers' ``AutoModel`` loads.

        :raises VembedError: ``folder`` exists and is not empty.
        """
        from vembed_fs2.interop.transformers import save_hf

        save_hf(self, Path(folder))

    def save_sentence_transformers(self, folder: str | Path) -> None:
        """Write a folder that sentence-transformers loads.

        :raises VembedError: ``folder`` exists and is not empty, or the model cannot be expressed.
        """
        from vembed_fs2.interop.sentence_transformers import save_sentence_transformers

        save_sentence_transformers(self, Path(folder))

    def save_open_clip(self, folder: str | Path) -> None:
        """Write a folder that open_clip loads.

        :raises VembedError: ``folder`` exists and is not empty, or the model cannot be expressed.
        """
        from vembed_fs2.interop.open_clip import save_open_clip

        save_open_clip(self, Path(folder))

    def _prompt(self, name: str | None) -> str | None:
        if name is None:
            return self.processor.prompt_for(None)
        prompts = self.processor.settings.prompts
        if name not in prompts:
            known = ", ".join(prompts) or "none"
            raise VembedError(f"The model has no prompt named '{name}'. Its prompts: {known}.")
        return prompts[name]

    def _role_prompt(self, role: str, prompt_name: str | None, kwargs: dict[str, Any]) -> str | None:
        if prompt_name is not None or kwargs.get("prompt") is not None:
            return prompt_name
        return self.processor.role_prompt(role)

    @property
    def _is_multi_vector(self) -> bool:
        return self.model.similarity == "maxsim"

    def _encode(
        self, items: Sequence[Item], prompt: str | None, batch_size: int | None, progress: bool | None, finish: _Finish
    ) -> Tensor | list[Tensor]:
        output: Tensor | list[Tensor] = torch.empty(len(items), finish.dim, device=self.device)
        if self._is_multi_vector:
            output = [torch.empty(0)] * len(items)
        size = _IMAGE_WINDOW if any(item.images for item in items) else _WINDOW
        windows = [items[start : start + size] for start in range(0, len(items), size)]
        with (
            _evaluating(self.model),
            self._autocast(),
            ThreadPoolExecutor(1, "vembed-prepare") as pool,
            _Progress(len(items), bool(progress)) as bar,
        ):
            pending: Future[EncoderBatch] | None = None
            for idx, window in enumerate(windows):
                batch = pending.result() if pending is not None else self._prepare(window, prompt)
                pending = pool.submit(self._prepare, windows[idx + 1], prompt) if idx + 1 < len(windows) else None
                for rows, embeddings in self._encode_window(batch, batch_size):
                    finish.store(output, [idx * size + r for r in rows], embeddings)
                bar.advance(len(window))
        return output

    def _prepare(self, items: Sequence[Item], prompt: str | None) -> EncoderBatch:
        return self.processor(items, prompt=prompt)

    def _encode_window(self, batch: EncoderBatch, batch_size: int | None) -> Iterator[tuple[list[int], Embeddings]]:
        """Encode a window in chunks; yields the rows of each and their embeddings."""
        budget = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS["cpu"])
        for chunk in plan_chunks(batch.profile(), budget):
            step = batch_size or len(chunk.rows)
            for start in range(0, len(chunk.rows), step):
                rows = list(chunk.rows[start : start + step])
                part = batch.select(rows)
                part.to(self.device)
                with torch.inference_mode():
                    embeddings = self.model(part)
                yield rows, embeddings

    def _autocast(self) -> AbstractContextManager[Any]:
        """The type to compute in. Around all batches, so that weights are cast once."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)


@dataclass(frozen=True)
class _Finish:
    """Makes embeddings of what a model returns."""

    dim: int
    """How many leading dimensions are kept."""

    unit: bool
    """Whether vectors are scaled to unit length."""

    on_cpu: bool
    """Whether they leave the device at once: those of all inputs may not fit there."""

    def __call__(self, values: Tensor) -> Tensor:
        values = values.float()[..., : self.dim]
        values = normalize(values, dim=-1) if self.unit else values
        return values.cpu() if self.on_cpu else values

    def store(self, output: Tensor | list[Tensor], rows: Sequence[int], embeddings: Embeddings) -> None:
        """Put embeddings of some rows where they belong."""
        values, mask = embeddings.values, embeddings.mask
        if isinstance(output, Tensor):
            output[torch.tensor(rows, device=output.device)] = self(values)
            return
        if mask is None:
            mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        parts = torch.split(self(values[mask]), mask.sum(1).tolist())
        for row, vectors in zip(rows, parts):
            output[row] = vectors


def _find_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as ex:  # The latter where torch is not built for GPUs.
        reason = str(ex).splitlines()[0].rstrip(".")
        raise VembedError(f"The device '{device}' cannot be used: {reason}.") from None


def load_processor(
    model: EmbeddingModel, folder: Path, image_folder: Path | None = None, *, max_length: int | None = None
) -> TowerProcessor:
    """Load the processor that belongs to ``model`` from ``folder``.

    :param image_folder: where the image processor is, if the tokenizer is somewhere else.
    """
    kinds: set[str] = set(model.modalities)
    processor = TowerProcessor.load(
        folder,
        frozenset(kinds if image_folder is None else kinds - {"image"}),
        max_length=max_length,
        model_max_length=model.max_text_length,
        tokens_per_image=model.tokens_per_image,
        text_padding=model.text_padding,
    )
    if image_folder is not None:
        processor.image = TowerProcessor.load(image_folder, frozenset({"image"})).image
    return processor


def quantize(values: Array, precision: Precision) -> Array:
    """Quantize float embeddings ``[N, D]`` as sentence-transformers' ``quantize_embeddings`` does.

    ``int8`` and ``uint8`` divide the range of each dimension in ``values`` into
    255 steps; ``binary`` and ``ubinary`` keep signs, eight to a byte.
    """
    if precision in ("binary", "ubinary"):
        packed: Array = np.packbits(values > 0, axis=-1)
        return (packed - np.uint8(128)).view(np.int8) if precision == "binary" else packed
    if precision == "float32" or not len(values):
        return values.astype(precision)
    low, high = values.min(axis=0, keepdims=True), values.max(axis=0, keepdims=True)
    steps = np.where(high > low, (high - low) / 255, np.float32(1))
    buckets: Array = np.clip(np.floor((values - low) / steps), 0, 255)
    return buckets.astype(np.uint8) if precision == "uint8" else (buckets - 128).astype(np.int8)


def _is_single(inputs: object) -> bool:
    if isinstance(inputs, _ONE_INPUT):
        return True
    if isinstance(inputs, Iterable) and isinstance(inputs, Sized):
        return False
    if isinstance(inputs, Iterable):
        raise DataError("`inputs` must be one input or a list. For an iterator, use `encode_stream`.")
    return True


@contextmanager
def _evaluating(model: EmbeddingModel) -> Iterator[None]:
    """Turn dropout off for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Progress:
    """A progress bar, or nothing."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._bar: Any = None
        if enabled:
            from rich.progress import Progress

            self._bar = Progress()
            self._task = self._bar.add_task("encode", total=total)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, n: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, n)

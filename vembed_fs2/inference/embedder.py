"""Texts and images in, embeddings out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from vembed_fs2.data.example import Item, Role
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import DataError, VembedError
from vembed_fs2.formats.registry import get_writer
from vembed_fs2.hub.find import ModelSource, find_model
from vembed_fs2.hub.load import load_processor, load_source
from vembed_fs2.inference.encoder import Encoded, Encoder
from vembed_fs2.inference.inputs import as_items, as_several, as_single
from vembed_fs2.inference.progress import track
from vembed_fs2.inference.similarity import Embedded, compare_all, compare_pairs
from vembed_fs2.inference.vectors import Precision, VectorOptions
from vembed_fs2.processing.processor import Processor


class Embedder:
    """A model with its processor.

    .. code:: python

        embedder = Embedder.load("sentence_transformers_all_minilm_l6_v2")
        vectors = embedder.encode(["a text", "another"])
    """

    def __init__(self, model: EmbeddingModel, processor: Processor[Any], source: ModelSource) -> None:
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
        """Load a folder, a run, a checkpoint, a card, or a repository of the Hugging Face hub.

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

    def __repr__(self) -> str:
        source, model = self.source, self.model
        return f"Embedder({source.name}, {source.family}, {model.embedding_dim}, {model.similarity}, {self.device})"

    def to(self, device: torch.device | str) -> Embedder:
        """Move the model to a device. *Returns:* this embedder.

        :raises VembedError: the device cannot be used.
        """
        self.model.to(_find_device(device))
        return self

    @property
    def device(self) -> torch.device:
        """The device that computes embeddings."""
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
        *,
        role: Role | None = None,
    ) -> Any:
        """Encode inputs.

        :param inputs: one, or a list or iterator of: str (text), PIL image, ``Path`` or bytes
            (image), dict with ``text``, ``image`` (one or a list), ``instruction``, or a list
            of texts and images in their order.
        :param prompt_name: the name of one of the model's prompts.
        :param prompt: a text put before each text; overrides ``prompt_name``.
        :param batch_size: the most inputs per forward pass; chosen by length if ``None``.
        :param truncate_dim: keep this many leading dimensions (Matryoshka).
        :param normalize_embeddings: scale each vector to unit length; ``None`` does what the model says.
        :param role: the side that the inputs stand on, as :meth:`encode_query` and :meth:`encode_document` say it.
        :returns: float32 ``[N, D]`` in input order (``[D]`` for one input);
            other types for other values of ``precision``. Of multi-vector
            models, a list of ``[L_i, D]`` in input order.
        :raises DataError: an input has neither a text nor an image, or cannot be read.
        :raises VembedError: an option is not valid, or there is no such prompt.
        """
        options = VectorOptions.of(self.model, truncate_dim, precision, normalize_embeddings, convert_to_tensor)
        several = as_several(inputs)
        items = [as_single(inputs)] if several is None else list(as_items(several))

        encoded = self._encode(items, role, self._prompt(prompt_name, prompt), batch_size, options)
        if show_progress_bar:
            encoded = track(encoded, len(items))

        output = options.collect(encoded, len(items), self.device)
        return output[0] if several is None else output

    def encode_query(self, inputs: object, prompt_name: str | None = None, **kwargs: Any) -> Any:
        """:meth:`encode` queries: with the model's ``query`` prompt, if it has one."""
        return self.encode(inputs, prompt_name, role="query", **kwargs)

    def encode_document(self, inputs: object, prompt_name: str | None = None, **kwargs: Any) -> Any:
        """:meth:`encode` documents: with the model's ``document`` (or ``passage``, or ``corpus``) prompt, if any."""
        return self.encode(inputs, prompt_name, role="document", **kwargs)

    def encode_stream(
        self,
        inputs: Iterable[object],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
        normalize_embeddings: bool | None = None,
        convert_to_tensor: bool = False,
        *,
        role: Role | None = None,
    ) -> Iterator[Any]:
        """Encode inputs as they come; yields one embedding per input, in order, in constant memory.

        Inputs are read and prepared up to 2,048 (or 256 images) ahead, while
        those before them are encoded. It takes the arguments of :meth:`encode`.

        :returns: ``[D]`` per input, or ``[L, D]`` of multi-vector models.
        :raises DataError: ``inputs`` is one input, or an input cannot be read;
            raised as soon as it is found, even if inputs before it have not been yielded.
        :raises VembedError: an option is not valid. ``int8`` and ``uint8`` are
            not, because the range of their values depends on all inputs.
        """
        options = VectorOptions.of(self.model, truncate_dim, precision, normalize_embeddings, convert_to_tensor)

        if precision in ("int8", "uint8"):
            raise VembedError(f"`precision` must not be {precision!r} in a stream: its range is not known.")
        several = as_several(inputs)
        if several is None:  # A string would be a stream of its letters.
            raise DataError("`inputs` must be a list or an iterator. For one input, use `encode`.")

        encoded = self._encode(as_items(several), role, self._prompt(prompt_name, prompt), batch_size, options)
        return options.in_order(track(encoded, None) if show_progress_bar else encoded)

    def similarity(self, a: Embedded, b: Embedded) -> Any:
        """Compare all of ``a`` with all of ``b``, as the model's embeddings are compared. *Returns:* ``[N, M]``.

        Of multi-vector models, ``a`` are the queries: MaxSim sums over their
        vectors (see :func:`~vembed_fs2.evaluation.search.exact_search`).
        """
        return compare_all(a, b, self.model.similarity)

    def similarity_pairwise(self, a: Embedded, b: Embedded) -> Any:
        """Compare row by row. *Returns:* ``[N]``."""
        return compare_pairs(a, b, self.model.similarity)

    def save(self, folder: str | Path, layout: str) -> None:
        """Write a folder that another library loads.

        :param layout: ``hf`` (transformers), ``sentence-transformers``, ``open_clip``, or the layout of a plugin.
        :raises VembedError: ``folder`` exists and is not empty, the layout cannot
            express the model, or there is no such layout.
        """
        get_writer(layout)(self, Path(folder))

    def save_hf(self, folder: str | Path) -> None:
        """Write a folder that transformers' ``AutoModel`` loads. See :meth:`save`."""
        self.save(folder, "hf")

    def save_sentence_transformers(self, folder: str | Path) -> None:
        """Write a folder that sentence-transformers loads. See :meth:`save`."""
        self.save(folder, "sentence-transformers")

    def save_open_clip(self, folder: str | Path) -> None:
        """Write a folder that open_clip loads. See :meth:`save`."""
        self.save(folder, "open_clip")

    def _encode(
        self,
        items: Iterable[Item],
        role: Role | None,
        prompt: str | None,
        batch_size: int | None,
        options: VectorOptions,
    ) -> Iterator[Encoded]:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise VembedError(f"`batch_size` must be an integer greater than or equal to 1, but is {batch_size!r}.")
        if role not in (None, *get_args(Role)):
            raise VembedError(f"`role` must be one of {', '.join(get_args(Role))}, but is {role!r}.")

        encoder = Encoder(self.model, self.processor, autocast_dtype=self.autocast_dtype)
        return encoder.encode(items, role=role, prompt=prompt, batch_size=batch_size, finish=options.finish)

    def _prompt(self, name: str | None, prompt: str | None) -> str | None:
        """The prompt that the caller asks for; ``None`` leaves it to the processor."""
        if not isinstance(prompt, (str, type(None))):
            raise VembedError(f"`prompt` must be a text, but is of type `{type(prompt).__name__}`.")
        if name is None or prompt is not None:
            return prompt

        prompts = self.processor.settings.prompts
        if name not in prompts:
            known = ", ".join(prompts) or "none"
            raise VembedError(f"The model has no prompt named '{name}'. Its prompts: {known}.")

        return prompts[name]


def _find_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as ex:  # The latter where torch is not built for GPUs.
        reason = str(ex).splitlines()[0].rstrip(".")
        raise VembedError(f"The device '{device}' cannot be used: {reason}.") from None

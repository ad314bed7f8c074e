"""Texts and images in, embeddings out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from vembed_fs2.console import Screen
from vembed_fs2.data.example import Item, Role
from vembed_fs2.dtypes import DtypeLike, dtype_name, find_dtype
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import DataError, VembedError
from vembed_fs2.formats.folder import ModelFolder
from vembed_fs2.formats.ranges import Ranges, read_ranges
from vembed_fs2.formats.registry import get_writer
from vembed_fs2.hub.find import ModelSource, find_model
from vembed_fs2.hub.load import load_processor, load_source
from vembed_fs2.inference.encoder import Encoded, Encoder
from vembed_fs2.inference.foreign import refuse_foreign
from vembed_fs2.inference.inputs import as_items, as_several, as_single, names_image
from vembed_fs2.inference.progress import track
from vembed_fs2.inference.quantize import Array, Precision, as_floats, measure_ranges
from vembed_fs2.inference.similarity import Embedded, compare_all, compare_pairs
from vembed_fs2.inference.vectors import VectorOptions
from vembed_fs2.processing.processor import Processor

log = logging.getLogger("vembed_fs2")


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

        self.ranges: Ranges | None = None
        """What int8 and uint8 embeddings lie between: see :meth:`calibrate`."""

        self.truncate_dim: int | None = None
        """The leading dimensions that are kept, if a call does not say it; a folder of sentence-transformers may."""

        self._has_warned = False

    @staticmethod
    def load(
        name_or_path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: DtypeLike = torch.float32,
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> Embedder:
        """Load a folder, a run, a checkpoint, a card, or a repository of the Hugging Face hub.

        :param device: where to compute; a GPU if there is one.
        :param dtype: the type of the weights, and so of what is computed: a torch type, its name, or "auto",
            which is bfloat16 where the device multiplies it natively and float32 elsewhere. Embeddings are
            float32 whatever it is.
        :param max_length: overrides the model's longest text, in tokens.
        :param trust_remote_code: whether Python code that comes with the model may be run. It can do anything.
        :raises ModelLoadError: there is no such model, or it is broken.
        :raises VembedError: an option is not valid.
        """
        device = _find_device(device)
        dtype = find_dtype(dtype, device)

        if max_length is not None and max_length < 3:
            raise VembedError(f"`max_length` must be greater than or equal to 3, but is {max_length}.")

        source = find_model(name_or_path, trust_remote_code=trust_remote_code)
        model = load_source(source, device=device, dtype=dtype)
        folder = source.processor_folder()
        processor = load_processor(model, folder, max_length=max_length)

        embedder = Embedder(model, processor, source)
        embedder.ranges = read_ranges(folder, model.embedding_dim)
        if (opened := ModelFolder.maybe_open(folder)) is not None:
            embedder.truncate_dim = opened.truncate_dim()
        return embedder

    def __repr__(self) -> str:
        source, model = self.source, self.model
        return f"Embedder({source.name}, {source.family}, {model.embedding_dim}, {model.similarity}, {self.device})"

    def to(self, device: torch.device | str) -> Embedder:
        """Move the model to a device. *Returns:* this embedder.

        :raises VembedError: the device cannot be used.
        """
        self.model.to(_find_device(device))
        return self

    def _move(self, device: torch.device | str | None) -> None:
        """:raises VembedError: it is a list of devices, as sentence-transformers takes it, or cannot be used."""
        if isinstance(device, (list, tuple)):
            raise VembedError("`device` must be one device: run a process with an `Embedder` for each of several.")
        if device is not None:
            self.to(device)

    @property
    def device(self) -> torch.device:
        """The device that computes embeddings."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, without what the model holds for objectives."""
        return next(p.dtype for name, p in self.model.named_parameters() if name not in self.model.learned)

    @property
    def embedding_dim(self) -> int:
        """The size of an embedding, if a call does not truncate it."""
        return min(self.truncate_dim or self.model.embedding_dim, self.model.embedding_dim)

    def encode(
        self,
        inputs: object,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | Screen | None = None,
        truncate_dim: int | None = None,
        precision: Precision | None = "float32",
        normalize_embeddings: bool | None = None,
        convert_to_tensor: bool = False,
        *,
        raw: bool = False,
        ranges: object = None,
        role: Role | None = None,
        convert_to_numpy: bool = True,
        device: torch.device | str | None = None,
        **others: object,
    ) -> Any:
        """Encode inputs.

        :param inputs: one, or a list or iterator of: str (text), PIL image, ``Path`` or bytes
            (image), dict with ``text``, ``image`` (one or a list), ``instruction``, or a list
            of texts and images in their order.
        :param prompt_name: the name of one of the model's prompts.
        :param prompt: a text put before each text; overrides ``prompt_name``.
        :param batch_size: the most inputs per forward pass; chosen by length if ``None``.
        :param show_progress_bar: show how many inputs are encoded, their rate and the time left on the standard error
            (or a :class:`~vembed_fs2.console.Screen`); outside a terminal, as a line now and then.
        :param truncate_dim: keep this many leading dimensions (Matryoshka), after the normalisation that the model
            ends with, if it has one.
        :param precision: ``int8`` and ``uint8`` need ranges: the model's (see :meth:`calibrate`), or ``ranges``.
        :param normalize_embeddings: ``True`` scales each vector to unit length, after truncation. ``False`` adds
            nothing, and takes no normalisation of the model's own away. ``None`` scales if nobody has said
            whether the model normalises.
        :param convert_to_tensor: return a tensor, on the model's device.
        :param raw: return what the model computes before its normalisation.
        :param ranges: the smallest and the largest value of each dimension. *Shape:* ``[2, D]``.
        :param role: the side that the inputs stand on, as :meth:`encode_query` and :meth:`encode_document` say it.
        :param convert_to_numpy: if ``False``, return a list of tensors, one for each input.
        :param device: move the model there first, for good.
        :param others: arguments of sentence-transformers that have another name here; the error names it.
        :returns: float32 ``[N, D]`` in input order (``[D]`` for one input);
            other types for other values of ``precision``. Of multi-vector
            models, a list of ``[L_i, D]`` in input order.
        :raises DataError: an input has neither a text nor an image, or cannot be read.
        :raises VembedError: an option is not valid, or there is no such prompt.
        """
        refuse_foreign(self.encode, others)
        self._move(device)

        as_tensor = convert_to_tensor or not convert_to_numpy
        options = self._options(truncate_dim, precision, normalize_embeddings, raw, ranges, as_tensor)
        several = as_several(inputs)
        items = [as_single(inputs)] if several is None else list(as_items(several))

        show, total = show_progress_bar, len(items)
        encoded = self._encode(items, role, self._prompt(prompt_name, prompt), batch_size, options, show, total)
        output = options.collect(encoded, len(items), self.device)
        if several is None:
            return output[0]
        return output if convert_to_tensor or convert_to_numpy else list(output)

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
        show_progress_bar: bool | Screen | None = None,
        truncate_dim: int | None = None,
        precision: Precision | None = "float32",
        normalize_embeddings: bool | None = None,
        convert_to_tensor: bool = False,
        *,
        raw: bool = False,
        ranges: object = None,
        role: Role | None = None,
        convert_to_numpy: bool = True,
        device: torch.device | str | None = None,
        **others: object,
    ) -> Iterator[Any]:
        """Encode inputs as they come; yields one embedding per input, in order, in constant memory.

        Inputs are read and prepared up to 2,048 (or 256 images) ahead, while
        those before them are encoded. It takes the arguments of :meth:`encode`.

        :returns: ``[D]`` per input, or ``[L, D]`` of multi-vector models.
        :raises DataError: ``inputs`` is one input, or an input cannot be read;
            raised as soon as it is found, even if inputs before it have not been yielded.
        :raises VembedError: an option is not valid.
        """
        refuse_foreign(self.encode_stream, others)
        self._move(device)

        as_tensor = convert_to_tensor or not convert_to_numpy
        options = self._options(truncate_dim, precision, normalize_embeddings, raw, ranges, as_tensor)
        several = as_several(inputs)
        if several is None:  # A string would be a stream of its letters.
            raise DataError("`inputs` must be a list or an iterator. For one input, use `encode`.")

        items, show = as_items(several), show_progress_bar
        return options.in_order(
            self._encode(items, role, self._prompt(prompt_name, prompt), batch_size, options, show, None)
        )

    def calibrate(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | Screen | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool | None = None,
        *,
        raw: bool = False,
        role: Role | None = None,
    ) -> Array:
        """Find the ranges that int8 and uint8 embeddings need, and keep them; :meth:`save` writes them.

        Values beyond a range are cut. So take some thousand inputs like those that will be searched.

        :param inputs: as :meth:`encode` takes several, or float embeddings of this model, ``[N, D]``.
        :returns: the smallest and the largest value of each dimension. *Shape:* ``[2, D]``.
        :raises VembedError: there are fewer than two embeddings, or an option is not valid.
        """
        is_encoded = _are_vectors(inputs)
        if is_encoded and truncate_dim is None:
            truncate_dim = int(inputs.shape[1])

        options = self._options(truncate_dim, "float32", normalize_embeddings, raw)
        if options.is_multi_vector:
            raise VembedError("A multi-vector model has float32 embeddings only, which need no ranges.")

        if is_encoded:
            blocks: Iterable[Tensor] = [torch.as_tensor(inputs).detach().float()]
            if inputs.shape[1] != options.dim:
                raise VembedError(f"Embeddings must have {options.dim} dimensions, but have {inputs.shape[1]}.")
        elif (several := as_several(inputs)) is None:
            raise DataError("`inputs` must be a list or an iterator of many inputs.")
        else:
            items = as_items(several)
            prompt = self._prompt(prompt_name, prompt)
            encoded = self._encode(items, role, prompt, batch_size, options, show_progress_bar, None)
            blocks = (part.values for _, part in encoded)

        self.ranges = Ranges(values=measure_ranges(blocks), scaling=options.scaling)
        return self.ranges.values

    def similarity(self, a: Embedded, b: Embedded, *, precision: Precision | None = None, ranges: object = None) -> Any:
        """Compare all of ``a`` with all of ``b``, as the model's embeddings are compared. *Returns:* ``[N, M]``.

        Of multi-vector models, ``a`` are the queries: MaxSim sums over their
        vectors (see :func:`~vembed_fs2.evaluation.search.exact_search`).
        Quantized embeddings are compared as the floats that they stand for, with quantized ones or with floats.

        :param precision: what embeddings were quantized to, if their type and width do not say it.
        :param ranges: what they were quantized with, if not the model's ranges. *Shape:* ``[2, D]``.
        :raises VembedError: it is not known how embeddings were quantized.
        """
        a, b = (self._as_floats(x, precision, ranges) for x in (a, b))
        return compare_all(a, b, self.model.similarity)

    def similarity_pairwise(
        self, a: Embedded, b: Embedded, *, precision: Precision | None = None, ranges: object = None
    ) -> Any:
        """Compare row by row, as :meth:`similarity` does. *Returns:* ``[N]``."""
        a, b = (self._as_floats(x, precision, ranges) for x in (a, b))
        return compare_pairs(a, b, self.model.similarity)

    def _as_floats(self, x: Embedded, precision: Precision | None, ranges: object) -> Embedded:
        if self.model.is_multi_vector:
            return x
        floats: Embedded = as_floats(x, self.embedding_dim, precision, ranges, self.ranges)
        return floats

    def save(self, folder: str | Path, layout: str) -> None:
        """Write a folder that another library loads. The weights are written in the type that they were loaded in.

        :param layout: ``hf`` (transformers), ``sentence-transformers``, ``open_clip``, or the layout of a plugin.
        :raises VembedError: ``folder`` exists and is not empty, the layout cannot
            express the model, or there is no such layout.
        """
        if self.dtype.itemsize < 4:
            log.warning("The weights are written as they were loaded, in %s.", dtype_name(self.dtype))
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

    def _options(
        self,
        truncate_dim: int | None,
        precision: Precision | None,
        normalize_embeddings: bool | None,
        raw: bool,
        ranges: object = None,
        as_tensor: bool = False,
    ) -> VectorOptions:
        return VectorOptions.of(
            self.model,
            truncate_dim=self.embedding_dim if truncate_dim is None else truncate_dim,
            precision=precision,
            normalize=normalize_embeddings,
            raw=raw,
            ranges=ranges,
            kept_ranges=self.ranges,
            as_tensor=as_tensor,
        )

    def _encode(
        self,
        items: Iterable[Item],
        role: Role | None,
        prompt: str | None,
        batch_size: int | None,
        options: VectorOptions,
        show: bool | Screen | None,
        total: int | None,
    ) -> Iterator[Encoded]:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise VembedError(f"`batch_size` must be an integer greater than or equal to 1, but is {batch_size!r}.")
        if role not in (None, *get_args(Role)):
            raise VembedError(f"`role` must be one of {', '.join(get_args(Role))}, but is {role!r}.")

        if "image" in self.model.modalities:
            items = self._watch(items)

        encoder = Encoder(self.model, self.processor, autocast_dtype=self.autocast_dtype)
        encode = partial(encoder.encode, items, role=role, prompt=prompt, batch_size=batch_size)
        if show:
            return track(encode, options.finish, total=total, show=show, role=role)
        return encode(finish=options.finish)

    def _watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass inputs on; say it once if a text names an image."""
        for item in items:
            if not self._has_warned and names_image(item):
                self._has_warned = True
                warnings.warn(
                    f"The text {item.text!r} is the path of an image, but a `str` is encoded as a text. For the image,"
                    " give `Path(...)` or {'image': ...}.",
                    stacklevel=2,
                )
            yield item

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


def _are_vectors(inputs: Any) -> bool:
    """Whether inputs are embeddings already: rows of floats."""
    if isinstance(inputs, Tensor):
        return inputs.ndim == 2 and inputs.is_floating_point()
    return isinstance(inputs, np.ndarray) and inputs.ndim == 2 and inputs.dtype.kind == "f"


def _find_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as ex:  # The latter where torch is not built for GPUs.
        reason = str(ex).splitlines()[0].rstrip(".")
        raise VembedError(f"The device '{device}' cannot be used: {reason}.") from None

"""Embeddings in one byte or one bit per dimension, and back.

Shapes: N inputs, D dimensions, B bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vembed_fs2.errors import VembedError
from vembed_fs2.formats.ranges import Ranges, Scaling, find_problem

Array: TypeAlias = NDArray[Any]
"""Embeddings outside torch."""

Precision: TypeAlias = Literal["float32", "int8", "uint8", "binary", "ubinary"]
"""The numbers of embeddings: floats, one byte per dimension, or one bit, eight in a byte."""

_BYTES: Final = ("int8", "uint8")

HOW_TO_CALIBRATE: Final = (
    "`embedder.calibrate(texts)` finds them with texts (or images, or float embeddings) like those that you will"
    " encode, and `ranges=` takes an array of shape [2, D]"
)
"""How to get ranges."""


def check_precision(precision: object) -> Precision:
    """:raises VembedError: there is no such precision."""
    if precision not in get_args(Precision):
        raise VembedError(f"`precision` must be one of {', '.join(get_args(Precision))}, but is {precision!r}.")
    return cast(Precision, precision)


def measure_ranges(blocks: Iterable[Tensor]) -> Array:
    """Return the smallest and the largest value of each dimension of embeddings ``[n, D]``. *Returns:* ``[2, D]``.

    :raises VembedError: there are fewer than two embeddings, or some are not finite.
    """
    count, low, high = 0, None, None
    for block in blocks:
        if len(block) == 0:
            continue
        if not bool(block.isfinite().all()):
            raise VembedError("Ranges cannot be found: an embedding holds NaN or infinity.")

        count += len(block)
        low = block.amin(0) if low is None else torch.minimum(low, block.amin(0))
        high = block.amax(0) if high is None else torch.maximum(high, block.amax(0))

    if low is None or high is None or count < 2:
        raise VembedError(f"Ranges need the embeddings of many inputs, but there are {count}.")

    result: Array = torch.stack([low, high]).cpu().numpy()
    return result


def find_ranges(given: object, kept: Ranges | None, precision: Precision, scaling: Scaling, dim: int) -> Array | None:
    """Return the ranges for embeddings of one form; ``None`` if the precision needs none. ``[2, dim]``.

    :param given: what the caller gives.
    :param kept: the ranges of the model.
    :raises VembedError: there are none, or they do not fit.
    """
    if precision not in _BYTES:
        if given is not None:
            raise VembedError(f"`ranges` belong to int8 and uint8, but `precision` is {precision!r}.")
        return None

    if given is not None:
        return check_ranges(given, dim)
    if kept is None:
        raise VembedError(f"{precision} embeddings need the ranges of their values: {HOW_TO_CALIBRATE}.")

    ranges = kept.fit(scaling, dim)
    if ranges is None:
        form = f"{kept.values.shape[1]} dimensions, scaling '{kept.scaling}'"
        raise VembedError(
            f"The model's ranges are those of embeddings of another form ({form}) than these ({dim} dimensions, scaling"
            f" '{scaling}'): call `calibrate` with the same `truncate_dim`, `normalize_embeddings` and `raw`."
        )
    return ranges


def check_ranges(given: object, dim: int) -> Array:
    """Return ranges as an array ``[2, dim]``.

    :raises VembedError: they are not valid.
    """
    values: Any = given.cpu().numpy() if isinstance(given, Tensor) else given
    try:
        ranges = np.asarray(values)
        problem = find_problem(ranges)
    except (TypeError, ValueError):
        problem = "must be numbers, of shape [2, D]"

    if problem is None and ranges.shape[1] != dim:
        problem = f"must have {dim} dimensions as the embeddings have, but has {ranges.shape[1]}"
    if problem is not None:
        raise VembedError(f"`ranges` {problem}.")
    return ranges


def quantize(values: Array, precision: Precision, ranges: Array | None = None) -> Array:
    """Quantize float embeddings ``[N, D]`` as sentence-transformers' ``quantize_embeddings(..., ranges=)`` does.

    ``int8`` and ``uint8`` divide the range of each dimension into 255 steps, cut
    what lies beyond it, and round down; ``binary`` and ``ubinary`` keep signs, eight to a byte.

    :param ranges: the smallest and the largest value of each dimension. *Shape:* ``[2, D]``.
    """
    if precision in ("binary", "ubinary"):
        packed: Array = np.packbits(values > 0, axis=-1)
        return (packed - np.uint8(128)).view(np.int8) if precision == "binary" else packed

    if precision == "float32":
        return values.astype(precision)

    assert ranges is not None
    buckets: Array = np.clip(np.floor((values - ranges[0]) / _steps(ranges)), 0, 255)
    return buckets.astype(np.uint8) if precision == "uint8" else (buckets - 128).astype(np.int8)


def dequantize(values: Array, precision: Precision, ranges: Array | None = None, dim: int | None = None) -> Array:
    """Turn quantized embeddings into floats: the middle of their step; 1 for a bit that is set, -1 for another.

    So the dot product of binary embeddings is D minus twice their Hamming distance.

    :param ranges: what ``int8`` and ``uint8`` were quantized with. *Shape:* ``[2, D]``.
    :param dim: the dimensions of ``binary`` and ``ubinary``; eight for each byte if ``None``.
    :returns: float32 ``[N, D]``.
    """
    if precision in ("binary", "ubinary"):
        packed = values.view(np.uint8) + np.uint8(128) if precision == "binary" else values
        bits: Array = np.unpackbits(packed, axis=-1, count=dim)
        return bits.astype(np.float32) * 2 - 1

    assert ranges is not None
    buckets = values.astype(np.float32) + (128 if precision == "int8" else 0)
    middle = np.where(ranges[1] > ranges[0], 0.5, 0.0)
    result: Array = ranges[0] + (buckets + middle) * _steps(ranges)
    return result.astype(np.float32)


def _steps(ranges: Array) -> Array:
    steps = (ranges[1] - ranges[0]) / 255
    result: Array = np.where(steps == 0, 1, steps)
    return result


def as_floats(x: Any, dim: int, precision: Precision | None, ranges: object, kept: Ranges | None) -> Any:
    """Return embeddings that can be compared: those of int8 and uint8 numbers as floats, all others as they are.

    :param x: ``[N, D]`` or ``[D]``, an array or a tensor, or a list of rows.
    :param dim: the size of the model's embeddings.
    :param precision: what they were quantized to; if ``None``, their type and width say it.
    :param ranges: what they were quantized with; the ``kept`` ranges of the model if ``None``.
    :raises VembedError: they were quantized in a way that is not known.
    """
    is_list = isinstance(x, Sequence) and not isinstance(x, str) and len(x) > 0
    first = x[0] if is_list else x
    is_tensor = isinstance(first, Tensor)
    if str(getattr(first, "dtype", "")).rpartition(".")[2] not in _BYTES:
        return x

    rows = [row.cpu().numpy() if isinstance(row, Tensor) else np.asarray(row) for row in (x if is_list else [x])]
    values = np.stack(rows) if is_list else rows[0]

    precision = precision or _guess_precision(values, dim, ranges, kept)
    if precision in _BYTES:
        floats = dequantize(values, precision, _ranges_of(values, precision, ranges, kept))
    else:
        is_whole = values.shape[-1] == (dim + 7) // 8
        floats = dequantize(values, precision, dim=dim if is_whole else None)

    return torch.from_numpy(floats).to(first.device) if is_tensor else floats


def _guess_precision(values: Array, dim: int, ranges: object, kept: Ranges | None) -> Precision:
    width, kind = values.shape[-1], values.dtype.name

    widths = {dim} if kept is None else {dim, kept.values.shape[1]}
    is_byte, is_bit = ranges is not None or width in widths, width == (dim + 7) // 8
    if is_byte == is_bit:
        raise VembedError(
            f"Embeddings of {width} values of type {kind} may hold a byte or a bit per dimension: say `precision`."
        )
    if is_byte:
        return "int8" if kind == "int8" else "uint8"
    return "binary" if kind == "int8" else "ubinary"


def _ranges_of(values: Array, precision: Precision, given: object, kept: Ranges | None) -> Array:
    width = values.shape[-1]
    if given is not None:
        return check_ranges(given, width)
    if kept is None:
        raise VembedError(f"To compare {precision} embeddings, their ranges are needed: {HOW_TO_CALIBRATE}.")
    if width > kept.values.shape[1]:
        raise VembedError(f"The model's ranges have {kept.values.shape[1]} dimensions, but embeddings have {width}.")
    return kept.values[:, :width]

"""The data types of weights: their names, what the hardware is fast in, and what "auto" means."""

from __future__ import annotations

from functools import cache
from typing import Final, Literal, TypeAlias

import torch

from vembed_fs2.errors import VembedError, did_you_mean

DtypeLike: TypeAlias = torch.dtype | Literal["auto", "float32", "bfloat16", "float16", "float64"] | str
"""A data type, its name, or ``"auto"``: bfloat16 where the device multiplies it natively, else float32."""

_DTYPES: Final = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}

DTYPE_NAMES: Final = ("auto", *_DTYPES)
"""The names of data types that weights can have, and what chooses one."""


def find_dtype(dtype: DtypeLike, device: torch.device | str | None = None) -> torch.dtype:
    """Return the data type that ``dtype`` stands for.

    :param device: where the model will compute; only ``"auto"`` depends on it. The CPU if ``None``.
    :raises VembedError: weights cannot be of that type.
    """
    if dtype == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32

    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    found = _DTYPES.get(name) if isinstance(name, str) else None
    if found is None:
        hint = did_you_mean(name, DTYPE_NAMES) if isinstance(name, str) else ""
        raise VembedError(f"`dtype` must be one of {', '.join(DTYPE_NAMES)}, but is {dtype!r}.{hint}")

    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which configurations and command lines call a data type: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def has_fast_bf16(device: torch.device | str | None = None) -> bool:
    """Whether a device multiplies bfloat16 matrices natively. CPU if ``None``."""
    kind = torch.device(device or "cpu").type
    if kind == "cuda":
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "cpu" and has_bfloat16_products()


@cache
def has_bfloat16_products() -> bool:
    """Whether the processor has instructions for products of bfloat16: AVX512-BF16 or AMX."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or has_matrix_tiles()


@cache
def has_matrix_tiles() -> bool:
    """Whether the processor has units for tiles of matrices (AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())

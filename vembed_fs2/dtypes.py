"""The data types of weights: their names, what the hardware is fast in, and what "auto" means.

Light: the command line reads the names before torch is imported.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final, TypeAlias, Union

from vembed_fs2.errors import VembedError, did_you_mean

if TYPE_CHECKING:
    import torch

DtypeLike: TypeAlias = Union["torch.dtype", str]
"""A data type, its name, or ``"auto"``: bfloat16 where the hardware multiplies it natively, else float32."""

DTYPE_NAMES: Final = ("float32", "bfloat16", "float16", "float64")
"""The types that weights can have."""

AUTO: Final = "auto"


def find_dtype(dtype: DtypeLike, device: torch.device | str | None = None) -> torch.dtype:
    """Return the data type that ``dtype`` stands for.

    :param device: where the model will compute, on which ``"auto"`` depends; by default a GPU if there is one.
    :raises VembedError: weights cannot be of that type.
    """
    import torch

    if isinstance(dtype, str) and dtype == AUTO:
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32

    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in DTYPE_NAMES:
        hint = did_you_mean(name, DTYPE_NAMES) if isinstance(name, str) else ""
        raise VembedError(f"`dtype` must be one of {', '.join((AUTO, *DTYPE_NAMES))}, but is {dtype!r}.{hint}")

    found: torch.dtype = getattr(torch, name)
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a data type, as configurations and command lines have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def has_fast_bf16(device: torch.device | str | None = None) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively.

    :param device: by default a GPU if there is one, else the processor.
    """
    import torch

    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    return kind == "cpu" and has_bfloat16_products()


@cache
def has_bfloat16_products() -> bool:
    """Whether the processor has instructions for products of bfloat16: AVX512-BF16 or AMX."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported()) or has_matrix_tiles()


@cache
def has_matrix_tiles() -> bool:
    """Whether the processor has units for tiles of matrices (AMX)."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())

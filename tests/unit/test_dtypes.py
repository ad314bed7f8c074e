"""Names of data types, and what "auto" chooses."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

from vembed_fs2 import dtypes
from vembed_fs2.dtypes import dtype_name, find_dtype, has_fast_bf16
from vembed_fs2.errors import VembedError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types_and_their_names(dtype: torch.dtype) -> None:
    assert find_dtype(dtype) == find_dtype(dtype_name(dtype)) == dtype


@pytest.mark.parametrize(("fast", "found"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_what_the_processor_is_fast_in(fast: bool, found: torch.dtype) -> None:
    with patch.object(dtypes, "has_bfloat16_products", lambda: fast):
        assert find_dtype("auto", "cpu") == found
        assert has_fast_bf16("cpu") == fast


def test_auto_asks_the_device_that_will_compute() -> None:
    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation: False),
        patch.object(dtypes, "has_bfloat16_products", lambda: True),
    ):
        assert find_dtype("auto") == find_dtype("auto", "cuda:1") == torch.float32
        assert find_dtype("auto", torch.device("cpu")) == torch.bfloat16
        assert find_dtype("auto", "meta") == torch.float32


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("bf16", r"but is 'bf16'\. Did you mean 'bfloat16'\?"),
        ("AUTO", "must be one of auto, float32, bfloat16, float16, float64, but is 'AUTO'"),
        (torch.int8, r"but is torch\.int8"),
        (torch.float8_e4m3fn, r"but is torch\.float8_e4m3fn"),
        (None, "but is None"),
        (16, "but is 16"),
    ],
)
def test_other_types_are_refused(dtype: object, message: str) -> None:
    with pytest.raises(VembedError, match=message) as error:
        find_dtype(dtype)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_names_are_read_without_torch() -> None:
    code = "import sys; from vembed_fs2.dtypes import DTYPE_NAMES; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

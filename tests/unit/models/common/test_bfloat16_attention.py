"""Attention of bfloat16 states on CPUs, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vembed_fs2.models.common import attention, bfloat16_attention
from vembed_fs2.models.common.attention import attend
from vembed_fs2.models.common.bfloat16_attention import attend_in_bfloat16, can_attend_in_bfloat16


@pytest.fixture(params=[2**19, 500])
def block(request: pytest.FixtureRequest) -> Iterator[int]:
    """A block that holds all, and one that holds some queries of one sequence."""
    with patch.object(bfloat16_attention, "_BLOCK", request.param):
        yield request.param


@pytest.fixture
def fast_processor() -> Iterator[None]:
    """A processor for which it is meant, whatever runs the test."""
    with (
        patch.object(bfloat16_attention, "has_bfloat16_products", lambda: True),
        patch.object(bfloat16_attention, "has_matrix_tiles", lambda: False),
    ):
        yield


def inputs(size: int = 3, length: int = 29, keys: int = 29) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, n, 4, 24, generator=g).mul(2).bfloat16() for n in (length, keys, keys))
    return q, k, v


def expected(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool = False) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    bias = bias.double() if bias is not None and bias.is_floating_point() else bias
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal).transpose(1, 2)


def biases() -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([29, 11, 1])
    own = torch.randn(1, 4, 29, 29, generator=g).bfloat16()
    return {
        "none": None,
        "padding": (torch.arange(29) < lengths[:, None])[:, None, None],
        "near": (torch.arange(29)[:, None] - torch.arange(29)).abs().le(3)[None, None],
        "of heads": own,
        "of heads and rows": own + torch.randn(3, 1, 1, 29, generator=g).bfloat16(),
    }


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", biases())
def test_it_equals_attention_in_float64(name: str) -> None:
    q, k, v = inputs()
    bias = biases()[name]
    got = attend_in_bfloat16(q, k, v, bias)
    assert got.dtype == torch.bfloat16
    # Weights and outputs are rounded once; queries times keys are not.
    torch.testing.assert_close(got.double(), expected(q, k, v, bias), rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("block")
def test_causal() -> None:
    q, k, v = inputs()
    torch.testing.assert_close(
        attend_in_bfloat16(q, k, v, None, causal=True).double(),
        expected(q, k, v, None, causal=True),
        rtol=2**-7,
        atol=2**-7,
    )


@pytest.mark.usefixtures("block")
def test_one_query_over_other_keys() -> None:
    q, k, v = inputs(length=1)
    torch.testing.assert_close(
        attend_in_bfloat16(q, k, v, None).double(), expected(q, k, v, None), rtol=2**-7, atol=2**-7
    )


def test_a_query_without_any_key_is_a_number() -> None:
    q, k, v = inputs()
    got = attend_in_bfloat16(q, k, v, torch.zeros(3, 1, 1, 29, dtype=torch.bool))
    assert got.isfinite().all()


@pytest.mark.usefixtures("fast_processor")
def test_it_is_used_in_inference_and_nowhere_else() -> None:
    q, k, v = inputs()
    with patch.object(attention, "attend_in_bfloat16", wraps=attend_in_bfloat16) as used:
        attend(q, k, v, None)
        with torch.no_grad():
            attend(q, k, v, None)
        assert not used.called
        with torch.inference_mode():
            attend(q.float(), k.float(), v.float(), None)
            attend(q.half(), k.half(), v.half(), None)
            assert not used.called
            with torch.autocast("cpu", torch.bfloat16):
                got = attend(q, k, v, None)
        assert used.call_count == 1
    torch.testing.assert_close(got.double(), expected(q, k, v, None), rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("fast_processor")
def test_long_and_empty_sequences_are_left_to_torch() -> None:
    with torch.inference_mode():
        q, k, _ = inputs(1, 2, 1025)
        assert not can_attend_in_bfloat16(q, k, causal=False)
        assert can_attend_in_bfloat16(q, k[:, :1024], causal=False)
        assert not can_attend_in_bfloat16(q, k[:, :1024], causal=True)
        assert not can_attend_in_bfloat16(q[:0], k[:0], causal=False)


@pytest.mark.parametrize(
    ("products", "tiles", "fits"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_it_depends_on_the_processor(products: bool, tiles: bool, fits: bool) -> None:
    q, k, _ = inputs()
    with (
        torch.inference_mode(),
        patch.object(bfloat16_attention, "has_bfloat16_products", lambda: products),
        patch.object(bfloat16_attention, "has_matrix_tiles", lambda: tiles),
    ):
        assert can_attend_in_bfloat16(q, k, causal=False) == fits

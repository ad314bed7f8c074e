"""The projection of patches in bfloat16 is a matrix product, equal to the convolution."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from vembed_fs2.models.common import vision
from vembed_fs2.models.common.vision import PatchProjection


def create_projection(patch_size: tuple[int, int], *, bias: bool) -> PatchProjection:
    torch.manual_seed(0)
    projection = PatchProjection(3, 24, patch_size, bias=bias, init_fn=lambda c: torch.nn.init.normal_(c.weight))
    if projection.bias is not None:
        torch.nn.init.normal_(projection.bias)
    return projection.bfloat16()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "patch_size"), [((32, 32), (16, 16)), ((33, 47), (14, 16)), ((4, 5), (4, 1))])
def test_it_equals_the_convolution(size: tuple[int, int], patch_size: tuple[int, int], bias: bool) -> None:
    projection, x = create_projection(patch_size, bias=bias), torch.randn(2, 3, *size)
    expected = torch.nn.Conv2d.forward(projection, x.bfloat16()).detach()
    with torch.inference_mode(), patch.object(vision, "has_bfloat16_products", lambda: True):
        got = projection(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-4)


def test_images_that_are_too_small_are_an_error_as_before() -> None:
    projection = create_projection((16, 4), bias=True)
    with (
        torch.inference_mode(),
        patch.object(vision, "has_bfloat16_products", lambda: True),
        pytest.raises(RuntimeError, match="Kernel size can't be greater"),
    ):
        projection(torch.randn(2, 3, 5, 9))

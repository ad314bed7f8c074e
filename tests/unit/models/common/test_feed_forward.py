"""Feed-forward networks whose bias and GELU are part of the matrix product."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vembed_fs2.dtypes import has_bfloat16_products
from vembed_fs2.embedding.activations import create_activation
from vembed_fs2.models.common.feed_forward import FusedFeedForwardNetwork

SHAPES = [(7, 24), (3, 5, 24), (1, 1, 24)]


def create_network(activation: str, *, bias: bool = True, dropout_p: float = 0.0) -> FusedFeedForwardNetwork:
    torch.manual_seed(0)
    return FusedFeedForwardNetwork(
        24, 40, bias, inner_activation=create_activation(activation), inner_dropout_p=dropout_p
    ).eval()


def compute(network: FusedFeedForwardNetwork, x: Tensor) -> tuple[Tensor, bool]:
    """What the network returns, and whether GELU was part of the product."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        y = network(x)
    return y, any(event.key == "mkldnn::_linear_pointwise" for event in recorded.key_averages())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_equal_in_inference(activation: str, bias: bool, shape: tuple[int, ...]) -> None:
    network, x = create_network(activation, bias=bias), torch.randn(shape) * 3
    expected, fused = compute(network, x)
    assert not fused
    with torch.inference_mode():
        got, fused = compute(network, x)
    assert fused
    torch.testing.assert_close(got, expected.detach(), rtol=1e-6, atol=1e-6)


def test_a_row_does_not_depend_on_the_others() -> None:
    network, x = create_network("gelu"), torch.randn(300, 24)
    with torch.inference_mode():
        together = network(x)
        for n in (1, 2, 17):
            torch.testing.assert_close(network(x[:n]), together[:n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "quick_gelu", "silu"])
def test_other_activations_are_computed_after_the_product(activation: str) -> None:
    with torch.inference_mode():
        assert not compute(create_network(activation), torch.randn(3, 24))[1]


def test_what_a_module_of_its_own_would_see_or_change_is_left_to_it() -> None:
    network, x = create_network("gelu"), torch.randn(3, 24)
    seen: list[Tensor] = []
    for module in (network.inner_proj, network.inner_activation):
        handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        with torch.inference_mode():
            assert not compute(network, x)[1]
        handle.remove()
    assert len(seen) == 2
    network.inner_proj = torch.nn.Sequential(network.inner_proj)  # As adapters take its place.
    with torch.inference_mode():
        assert not compute(network, x)[1]


def test_types_and_empty_batches_that_it_is_not_for() -> None:
    network = create_network("gelu")
    with torch.inference_mode():
        assert network(torch.empty(0, 24)).shape == (0, 24)
        with torch.autocast("cpu", torch.bfloat16):
            y, fused = compute(network, torch.randn(3, 24))
        assert (y.dtype, fused) == (torch.bfloat16, False)
        assert not compute(network.double(), torch.randn(3, 24, dtype=torch.float64))[1]
        assert not compute(create_network("gelu", dropout_p=0.5), torch.randn(3, 24))[1]


needs_products = pytest.mark.skipif(not has_bfloat16_products(), reason="the processor multiplies no bfloat16")


@needs_products
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_equal_in_bfloat16(activation: str, bias: bool, shape: tuple[int, ...]) -> None:
    network, x = create_network(activation, bias=bias), torch.randn(shape) * 3
    half = copy.deepcopy(network).bfloat16()
    with torch.inference_mode():
        expected = network(x)
        got, fused = compute(half, x.bfloat16())
    assert fused
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=3e-2)


@needs_products
def test_projections_of_another_type_or_that_someone_watches_are_called() -> None:
    network, x = create_network("gelu").bfloat16(), torch.randn(3, 24).bfloat16()
    seen: list[Tensor] = []
    handle = network.output_proj.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        y = network(x)
    handle.remove()
    assert torch.equal(seen[0], y)
    network.inner_proj.float()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="dtype"):  # torch's own error, no wrong numbers
        network(x)


def test_without_products_of_bfloat16() -> None:
    network, x = create_network("gelu").bfloat16(), torch.randn(3, 24).bfloat16()
    with (
        torch.inference_mode(),
        patch("vembed_fs2.models.common.feed_forward.has_bfloat16_products", lambda: False),
    ):
        assert not compute(network, x)[1]


def test_without_onednn() -> None:
    network, x = create_network("gelu"), torch.randn(3, 24)
    with torch.inference_mode(), patch("vembed_fs2.models.common.feed_forward._HAS_ONEDNN", False):
        assert not compute(network, x)[1]


def test_it_compiles_whole() -> None:
    network, x = create_network("gelu"), torch.randn(3, 24)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), network(x), rtol=1e-6, atol=1e-6)

"""Activation functions, against the formulas of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from vembed_fs2.embedding.activations import create_activation

NAMES = ["quick_gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh", "gelu"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    if name not in ACT2FN:
        pytest.skip(f"this transformers has no {name}")
    x = torch.linspace(-9, 9, 999, dtype=dtype).requires_grad_()
    grad = torch.randn(999, dtype=dtype, generator=torch.Generator().manual_seed(0))
    got, expected = create_activation(name)(x), ACT2FN[name](x)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)
    for a, b in zip(torch.autograd.grad(got, x, grad), torch.autograd.grad(expected, x, grad)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_input_is_kept_for_the_backward_pass(name: str) -> None:
    x = torch.randn(10).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        create_activation(name)(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_quick_gelu_compiles_whole() -> None:
    activation = create_activation("quick_gelu")
    x = torch.randn(10).requires_grad_()
    compiled = torch.compile(activation, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, activation(x))
    compiled.sum().backward()

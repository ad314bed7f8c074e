"""Activation functions by the names that Hugging Face configurations use for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal, TypeAlias, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Module
from torch.nn import functional as F
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError, did_you_mean

_Function: TypeAlias = Callable[[Tensor], Tensor]


@final
class Activation(Module):
    """An activation function without parameters, applied to each element."""

    gelu: Literal["exact", "tanh"] | None
    """Which GELU it is, if any."""

    def __init__(self, name: str, function: _Function) -> None:
        super().__init__()
        self.name = name
        self._function = function
        self.gelu = "exact" if function is F.gelu else "tanh" if function is _tanh_gelu else None

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)

    @override
    def extra_repr(self) -> str:
        return self.name


def create_activation(name: str, *, field: str = "hidden_act") -> Module:
    """Create the activation function that transformers calls ``name``.

    :param field: the field of the configuration that holds the name, for the error.
    :raises ModelLoadError: there is none, or it has parameters of its own.
    """
    function = _FUNCTIONS.get(name)
    if function is None:
        raise ModelLoadError(
            f"`{field}` is '{name}', which is not supported.{did_you_mean(name, _FUNCTIONS)}"
            f" Supported are: {', '.join(sorted(_FUNCTIONS))}."
        )

    return Activation(name, function)


class _QuickGelu(torch.autograd.Function):
    """``x * sigmoid(1.702 * x)`` that keeps only ``x`` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1.702 * x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        gate = (1.702 * x).sigmoid_()
        # The derivative: gate * (1 + 1.702 * x * (1 - gate)).
        return (1.0 - gate).mul_(x).mul_(1.702).add_(1.0).mul_(gate).mul_(grad)


def _quick_gelu(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(1.702 * x)  # The compiler makes one kernel of it, and keeps what it chooses.
    return _QuickGelu.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def _clipped_gelu(x: Tensor) -> Tensor:
    return F.gelu(x).clip(-10.0, 10.0)


def _laplace(x: Tensor) -> Tensor:
    mean, std = 0.707107, 0.282095
    return 0.5 * (1.0 + torch.erf((x - mean) / (std * math.sqrt(2.0))))


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


_tanh_gelu: Final = partial(F.gelu, approximate="tanh")

# The tanh variants of transformers are equal up to rounding: torch's is one kernel, and keeps least for the backward
# pass.
_FUNCTIONS: Final[dict[str, _Function]] = {
    "gelu": F.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _identity,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _squared_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}

"""Activation functions by the names that Hugging Face configurations use for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Final, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError

_Function: TypeAlias = Callable[[Tensor], Tensor]


@final
class Activation(Module):
    """An activation function without parameters, applied to each element."""

    def __init__(self, name: str, function: _Function) -> None:
        super().__init__()
        self.name = name
        self._function = function

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
        nearest = get_close_matches(name, _FUNCTIONS, 1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise ModelLoadError(
            f"`{field}` is '{name}', which is not supported.{hint} Supported are: {', '.join(sorted(_FUNCTIONS))}."
        )
    return Activation(name, function)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _fast_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _clipped_gelu(x: Tensor) -> Tensor:
    return F.gelu(x).clip(-10.0, 10.0)


def _laplace(x: Tensor) -> Tensor:
    mean, std = 0.707107, 0.282095
    return 0.5 * (1.0 + torch.erf((x - mean) / (std * math.sqrt(2.0))))


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


# The tanh variants are equal up to rounding; each keeps the formula of its name.
_FUNCTIONS: Final[dict[str, _Function]] = {
    "gelu": F.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _fast_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
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

"""A pooling: half way between the largest and the smallest value of each dimension."""

from __future__ import annotations

from torch import Tensor


def midrange(states: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return (states.amax(1) + states.amin(1)) / 2

    hidden = ~mask.unsqueeze(2)
    largest = states.masked_fill(hidden, float("-inf")).amax(1)
    smallest = states.masked_fill(hidden, float("inf")).amin(1)
    return (largest + smallest) / 2

"""Dropout of transformers' models and of ours, with the same masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module

from vembed_fs2.models.common.dropout import dropout


def assert_same_dropout(
    monkeypatch: pytest.MonkeyPatch,
    reference: Any,
    model: Module,
    theirs: Callable[[], Tensor],
    ours: Callable[[], Tensor],
) -> None:
    """Both draw the same random numbers in the same order, and so drop the same; and do it in training only.

    :param reference: computes attention without a kernel.
    """
    reference.train()
    model.train()
    torch.manual_seed(7)
    with monkeypatch.context() as patch:  # Let it draw the masks as we do.
        patch.setattr(torch.nn.functional, "dropout", lambda x, p, training, inplace=False: dropout(x, p * training))
        expected = theirs()
    torch.manual_seed(7)
    actual = ours()
    assert actual.shape == expected.shape
    assert float((actual - expected).detach().abs().max()) <= 1e-5
    reference.eval()
    assert float((theirs() - expected).detach().abs().max()) > 1e-2

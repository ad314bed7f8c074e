"""The base of what creates the modules of a model, and how their weights start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch.nn as nn
from fairseq2.nn import Linear, StandardEmbedding
from torch.nn import Conv2d

ConfigT = TypeVar("ConfigT")


class ModelFactory(Generic[ConfigT]):
    """Creates the modules of a model, of a configuration that is valid."""

    def __init__(self, config: ConfigT) -> None:
        self._config = config


def normal_init(std: float) -> Callable[[Linear | Conv2d], None]:
    """Make a function that draws weights from a normal distribution and zeroes biases."""

    def init_projection(proj: Linear | Conv2d) -> None:
        nn.init.normal_(proj.weight, std=std)
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)

    return init_projection


def create_embedding(num_embeddings: int, model_dim: int, std: float, pad_idx: int | None = None) -> StandardEmbedding:
    """
    :param std: the standard deviation of the initial values.
    :param pad_idx: the index of the padding token, whose embedding is zero and is not trained.
    """

    def init_embed(embed: StandardEmbedding) -> None:
        nn.init.normal_(embed.weight, std=std)

    return StandardEmbedding(num_embeddings, model_dim, pad_idx, init_fn=init_embed)

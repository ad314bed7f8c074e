"""The base of what creates the modules of a model."""

from __future__ import annotations

from typing import Generic, TypeVar

ConfigT = TypeVar("ConfigT")


class ModelFactory(Generic[ConfigT]):
    """Creates the modules of a model, of a configuration that is valid."""

    def __init__(self, config: ConfigT) -> None:
        self._config = config

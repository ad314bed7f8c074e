"""What a family says of its checkpoints in a library other than transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vembed_fs2.formats.key_map import KeyMap


class Dialect(ABC):
    """How the checkpoints of a family look in another library.

    A family registers it by the library's name, which the layout of the
    library's folders gives as :attr:`~vembed_fs2.formats.registry.Layout.dialect`.
    """

    @abstractmethod
    def reads_config(self, content: Mapping[str, Any]) -> bool:
        """Whether the family reads models of this configuration file.

        :raises ModelLoadError: no family can; the message names the option.
        """

    def describe(self, content: Mapping[str, Any]) -> str:
        """Say why no family reads this configuration file."""
        return "No family reads this model."

    @abstractmethod
    def from_config(self, folder: Path, content: Mapping[str, Any]) -> Any:
        """Convert the content of a configuration file to the family's configuration.

        :raises ModelLoadError: an option is not supported; the message names it.
        """

    def find_extra_fields(self, content: Mapping[str, Any], config: Any) -> dict[str, object]:
        """Return the fields of a configuration file that have no counterpart in ``config``, for export."""
        return {}

    @abstractmethod
    def has_names(self, keys: Iterable[str]) -> bool:
        """Whether tensors have the library's names."""

    @abstractmethod
    def key_map(self, config: Any) -> KeyMap:
        """Return how the library's tensors map to the tensors of a model of this configuration."""

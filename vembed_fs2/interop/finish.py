"""Writes what every exported folder has, whatever its layout."""

from __future__ import annotations

from pathlib import Path

from vembed_fs2.formats.ranges import write_ranges
from vembed_fs2.interop import Exportable
from vembed_fs2.interop.model_card import write_model_card


def finish_folder(exported: Exportable, folder: Path, name: str) -> None:
    """Write the tokenizer and the image processor, the ranges of quantized embeddings if there are any, and a card.

    :param folder: holds the configuration and the weights already.
    :param name: what the model is called.
    """
    exported.processor.save(folder)
    if exported.ranges is not None:
        write_ranges(exported.ranges, folder)

    write_model_card(exported, folder, name)

"""vembed_fs2: train, evaluate, run and ship embedding models with fairseq2.

The names below are imported on first use, so that ``import vembed_fs2`` costs
nothing and :mod:`vembed_fs2.losses`, :mod:`vembed_fs2.gradcache` and
:mod:`vembed_fs2.evaluation` work where only torch is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vembed_fs2._libsndfile import preload_libsndfile

if TYPE_CHECKING:
    from vembed_fs2 import evaluation as evaluation
    from vembed_fs2 import gradcache as gradcache
    from vembed_fs2 import losses as losses
    from vembed_fs2.embedding.model import EmbeddingModel as EmbeddingModel
    from vembed_fs2.embedding.model import Embeddings as Embeddings
    from vembed_fs2.embedding.model import EncoderBatch as EncoderBatch
    from vembed_fs2.gradcache import GradCache as GradCache
    from vembed_fs2.hub.load import load_model as load_model
    from vembed_fs2.inference.embedder import Embedder as Embedder
    from vembed_fs2.models.family import register_family as register_family
    from vembed_fs2.recipes.train.run import TrainingRun as TrainingRun
    from vembed_fs2.recipes.train.start import train as train

__version__ = "0.1.0"

# The fairseq2 binary wheel needs libsndfile, which most machines lack.
preload_libsndfile()

_EXPORTS = {
    "Embedder": "vembed_fs2.inference.embedder",
    "GradCache": "vembed_fs2.gradcache",
    "EmbeddingModel": "vembed_fs2.embedding.model",
    "Embeddings": "vembed_fs2.embedding.model",
    "EncoderBatch": "vembed_fs2.embedding.model",
    "register_family": "vembed_fs2.models.family",
    "load_model": "vembed_fs2.hub.load",
    "TrainingRun": "vembed_fs2.recipes.train.run",
    "train": "vembed_fs2.recipes.train.start",
}

_SUBMODULES = ("evaluation", "gradcache", "losses")

__all__ = sorted([*_EXPORTS, *_SUBMODULES])


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in _SUBMODULES:
        return import_module(f"vembed_fs2.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

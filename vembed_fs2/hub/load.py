"""Loads models by what a user types, and their processors."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import torch
from fairseq2.assets import AssetCardError, AssetDownloadError
from fairseq2.gang import Gangs, create_fake_gangs
from fairseq2.model_checkpoint import CorruptModelCheckpointError
from fairseq2.models import ModelFamily, ModelGatedError

from vembed_fs2.dtypes import DtypeLike, find_dtype
from vembed_fs2.embedding.head import Head
from vembed_fs2.embedding.learned import learned_in_float32
from vembed_fs2.embedding.model import EmbeddingModel
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.download import reason_of
from vembed_fs2.hub.find import ModelSource, find_model
from vembed_fs2.models.support import get_family_support
from vembed_fs2.processing.processor import Processor
from vembed_fs2.processing.towers import TowerProcessor
from vembed_fs2.resolver import get_resolver

log: Final = logging.getLogger("vembed_fs2")


def load_model(
    name_or_path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: DtypeLike = torch.float32,
    gangs: Gangs | None = None,
    trust_remote_code: bool = False,
) -> EmbeddingModel:
    """Load the bare model, in evaluation mode.

    :param name_or_path: a card, a Hugging Face folder, a run folder, a checkpoint folder, or a repository of the
        Hugging Face hub.
    :param dtype: the type of the weights, its name, or "auto" (see :func:`~vembed_fs2.dtypes.find_dtype`).
    :param trust_remote_code: whether Python code that comes with the model may be run.
    :raises ModelLoadError: there is no such model, or its checkpoint does not fit.
    :raises VembedError: weights cannot be of that type.
    """
    dtype = find_dtype(dtype, device or "cpu")
    source = find_model(name_or_path, trust_remote_code=trust_remote_code)
    return load_source(source, device=device, dtype=dtype, gangs=gangs)


def load_source(
    source: ModelSource,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    gangs: Gangs | None = None,
) -> EmbeddingModel:
    """Load the model of ``source``, in evaluation mode. What it holds for objectives is float32 at least."""
    family = get_resolver().resolve(ModelFamily, key=source.family)
    gangs = gangs or create_fake_gangs(torch.device(device or "cpu"))
    try:
        with learned_in_float32():
            if isinstance(source.weights, Path):
                model = family.load_custom_model(source.weights, source.config, gangs, dtype, False, False, None)
            else:
                model = family.load_model(source.weights, gangs, dtype, source.config, False, False)
    except CorruptModelCheckpointError as ex:
        reason = ex.__cause__ or ex
        raise ModelLoadError(f"{source.name}: the checkpoint does not fit the model. {reason}") from ex
    except AssetDownloadError as ex:
        raise ModelLoadError(f"{source.name} cannot be fetched: {reason_of(ex)}.") from ex
    except (AssetCardError, ModelGatedError) as ex:
        raise ModelLoadError(f"{source.name} cannot be loaded: {ex} {ex.__cause__ or ''}".rstrip()) from ex
    except ModelLoadError as ex:
        # What a family finds wrong with tensors does not say where they are from.
        raise ex if source.name in str(ex) else ModelLoadError(f"{source.name}: {ex}") from ex

    if not isinstance(model, EmbeddingModel):
        raise ModelLoadError(f"{source.name} is of family {source.family}, which has no embedding models.")

    return model.eval()


def load_processor(
    model: EmbeddingModel, folder: Path, image_folder: Path | None = None, *, max_length: int | None = None
) -> Processor[Any]:
    """Load the processor that belongs to ``model`` from ``folder``.

    :param image_folder: the folder of the image processor, if it is not the tokenizer's.
    :param max_length: overrides the model's longest text, in tokens.
    :raises ModelLoadError: a file is missing or broken.
    """
    load = get_family_support(model.family, get_resolver()).load_processor
    if load is not None and image_folder is None:
        return load(model, folder, max_length)

    return load_tower_processor(model, folder, image_folder, max_length=max_length)


def load_tower_processor(
    model: EmbeddingModel, folder: Path, image_folder: Path | None = None, *, max_length: int | None = None
) -> TowerProcessor:
    """Load the processor of a model that encodes texts and images apart. See :func:`load_processor`."""
    kinds: set[str] = set(model.modalities)

    processor = TowerProcessor.load(
        folder,
        frozenset(kinds if image_folder is None else kinds - {"image"}),
        max_length=max_length,
        model_max_length=model.max_text_length,
        vocab_size=model.vocab_size,
        tokens_per_image=model.tokens_per_image,
        text_padding=model.text_padding,
    )
    processor.takes_one_part = model.is_multi_vector

    # The head says it in a configuration; the processor's own file may say it as well.
    head = getattr(model, "head", None)
    if isinstance(head, Head) and not head.config.include_prompt:
        processor.settings.include_prompt = False

    # What the tokenizer does is right if the model was trained so. Old copies and version 5 of transformers are not:
    # they lose the token, and nobody else says so.
    last = isinstance(head, Head) and "last" in head.config.poolings
    if last and processor.text is not None and not processor.text.appends_token:
        log.warning(
            "The model pools the last token of a text, but its tokenizer in %s appends no end token. If the model was"
            " trained with one, its embeddings are wrong: add it to the post-processor of tokenizer.json.",
            folder,
        )

    if image_folder is not None:
        processor.image = TowerProcessor.load(image_folder, frozenset({"image"})).image

    return processor

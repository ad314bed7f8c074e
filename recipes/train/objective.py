"""What an objective asks of the model and of the data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily

from vembed_fs2.data.dataset import ExampleDataset
from vembed_fs2.data.example import Example
from vembed_fs2.data.usable import DataFacts, missing_in_data, missing_in_row
from vembed_fs2.distributed import RowGather
from vembed_fs2.embedding.head import is_late_interaction
from vembed_fs2.embedding.learned import LearnedPart, describe_changes
from vembed_fs2.embedding.model import EmbeddingModel, EmbeddingModelConfig, Modality
from vembed_fs2.errors import ConfigError, DataError
from vembed_fs2.losses import (
    LOSSES,
    AnglEConfig,
    CoSENTConfig,
    EmbeddingDistillationConfig,
    LossSpec,
    Objective,
    SpreadConfig,
    create_loss,
)
from vembed_fs2.recipes.train.config import LossSection
from vembed_fs2.resolver import get_resolver

_SINGLE_VECTOR: Final = (AnglEConfig, CoSENTConfig, EmbeddingDistillationConfig, SpreadConfig)
"""The configurations of objectives that cannot compare several vectors per row."""


def create_objective(section: LossSection, gather: RowGather | None = None) -> Objective:
    """Create the objective that the configuration names.

    :raises ConfigError: its values do not fit together.
    """
    try:
        return create_loss(section.name, section.config, gather)
    except ValueError as ex:
        raise ConfigError(str(ex), where="`loss`") from None


def create_blank(family_name: str, config: object) -> EmbeddingModel:
    """Create a model without memory for its weights, if the family can.

    :raises ConfigError: it is not an embedding model.
    """
    family = get_resolver().resolve(ModelFamily, key=family_name)
    gangs = create_fake_gangs(torch.device("cpu"))

    model = family.create_new_model(config, gangs, torch.float32, family.supports_meta, True)
    if not isinstance(model, EmbeddingModel):
        raise ConfigError(f"'{family_name}' is not a family of embedding models.", where="`model`")
    return model


def learned_parts(loss: Objective, embedding_dim: int, teacher_dim: int | None) -> Sequence[LearnedPart]:
    """Return what the objective learns besides the encoder.

    :param teacher_dim: the size of the teacher's embeddings, if the objective needs a teacher.
    :raises ConfigError: the objective does not fit embeddings of this size.
    """
    if errors := loss.dim_errors(embedding_dim):
        raise ConfigError(errors, where="`loss`")
    return loss.learned_parts(embedding_dim, teacher_dim)


def learned_changes(parts: Sequence[LearnedPart], model_config: object) -> Mapping[str, object]:
    """Return what the configuration of a model must say for it to hold all that the objective learns.

    :raises ConfigError: models of this family cannot hold it.
    """
    changes = describe_changes(model_config, parts)
    if changes and not isinstance(model_config, EmbeddingModelConfig):
        names = ", ".join(changes)
        raise ConfigError(f"models of this family cannot hold what the objective learns ({names}).", where="`loss`")

    return changes


def check_vectors(section: LossSection, *, several: bool) -> None:
    """Check that the objective, and all within it, compare what the model gives.

    :param several: whether the model gives several vectors per row.
    :raises ConfigError: lists those that do not.
    """
    if errors := list(_vector_errors(section.name, section.config, "", several)):
        raise ConfigError(errors, where="`loss`")


def _vector_errors(name: str, config: object, path: str, several: bool) -> Iterator[str]:
    config = LOSSES[name].config_kls() if config is None else config

    similarity = getattr(config, "similarity", None)
    if is_late_interaction(similarity) and not several:
        yield (
            f"`{path}config.similarity` is 'maxsim', which is for several vectors per row, but the model gives one: "
            "set another, or `model.config_overrides.head.pooling=none`."
        )

    if several and isinstance(config, _SINGLE_VECTOR):
        yield f"`{path}name` is '{name}', which is for one vector per row, but the model gives several."
    elif several and similarity in ("cosine", "dot"):
        yield f"`{path}config.similarity` must be 'maxsim', because the model gives several vectors per row."

    for field, value in vars(config).items():
        specs = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        for idx, spec in specs:
            if isinstance(spec, LossSpec):
                inner = f"{path}config.{field}." if idx is None else f"{path}config.{field}[{idx}]."
                yield from _vector_errors(spec.name, spec.config, inner, several)


class Reads(NamedTuple):
    """What a model can read."""

    modalities: frozenset[Modality]

    is_interleaved: bool
    """Whether it reads texts and images in their order."""

    is_multi_vector: bool = False
    """Whether it has several vectors per row, so that it cannot add up the parts of a row."""

    @staticmethod
    def of(model: EmbeddingModel) -> Reads:
        return Reads(model.modalities, model.is_interleaved, model.is_multi_vector)


def check_row(example: Example, loss: Objective, readers: Mapping[str, Reads]) -> None:
    """Check that a row to train on holds what the objective needs.

    :param readers: what the models that read the row can read, by what messages call them.
    :raises DataError: it does not.
    """
    if (problem := missing_in_row(example, loss)) is not None:
        raise DataError(f"{example.source}: {problem}.")
    check_readable(example, readers)


def check_readable(example: Example, readers: Mapping[str, Reads]) -> None:
    """:raises DataError: the row holds what a model cannot read."""
    for held, article in (("text", "a"), ("image", "an")):
        if any(item.images if held == "image" else item.text is not None for item in example.items):
            for name, reads in readers.items():
                if held not in reads.modalities:
                    raise DataError(f"{example.source}: the row has {article} {held}, but {name} reads none.")

    for item in example.items:
        for name, reads in readers.items():
            if reads.is_multi_vector and not reads.is_interleaved and len(item.parts) > 1:
                raise DataError(
                    f"{example.source}: {name} has several vectors per row, so a query or document must be one text or"
                    f" one image, but is {item.describe_order()}."
                )
            if item.is_interleaved and not reads.is_interleaved:
                raise DataError(f"{example.source}: {item.order_error(name)}")


def check_data(dataset: ExampleDataset, loss: Objective) -> None:
    """Check that a data set holds what the objective needs, beyond what each row must.

    :raises DataError: it does not. Of a large one only the labels are looked at, and only if its rows need them.
    """
    facts = dataset.facts
    if facts is None:
        num_of_one_side = len(dataset) if dataset.has_rows_of_one_side() else 0
        facts = DataFacts(len(dataset), num_of_one_side, num_with_negatives=len(dataset))

    sizes: list[int] = []
    if facts.num_of_one_side:
        labels = dataset.labels()
        sizes = np.unique(labels[labels != 0], return_counts=True)[1].tolist()

    if problem := next(missing_in_data(facts, sizes, loss), None):
        raise DataError(f"{problem[0].upper()}{problem[1:]}.")

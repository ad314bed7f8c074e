"""The objectives of the exactness table, each with options that reach its code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from vembed_fs2.losses import LOSSES
from vembed_fs2.losses.combined import WeightedLossSpec
from vembed_fs2.losses.infonce import InfoNCEConfig

ALL: Final = ("query_to_document", "document_to_query", "query_to_query", "document_to_document")


@dataclass(frozen=True)
class Options:
    name: str
    """As it is registered."""

    config: Any
    projection: bool = False
    """Whether the model projects its embeddings to a teacher's size."""

    decides: bool = False
    """Whether it chooses rows or vectors by comparing similarities. Then rounding can choose others, and bfloat16
    does: its gradient jumps, in the plain step as well."""

    one_sided: Literal["", "some", "all"] = ""
    """Which rows have a label in place of a positive."""

    mixed: bool = False
    """Whether rows are texts and images in any order, and the model is one that reads both together."""

    @property
    def tolerance(self) -> dict[str, float]:
        """The largest relative error of the gradient by data type."""
        if self.decides or self.multi_vector:
            return {"fp32": 1e-5, "bf16": 0.1}
        # The plain step of that model is itself about 0.02 from float64.
        return {"fp32": 1e-5, "bf16": 5e-2 if self.mixed else 2e-2}

    @property
    def multi_vector(self) -> bool:
        return getattr(self.config, "similarity", "") == "maxsim"


def options(
    name: str,
    *,
    projection: bool = False,
    decides: bool = False,
    one_sided: Literal["", "some", "all"] = "",
    mixed: bool = False,
    **values: Any,
) -> Options:
    return Options(name, LOSSES[name].config_kls(**values), projection, decides, one_sided, mixed)


COMBINED: Final = [
    WeightedLossSpec(name="infonce", config=InfoNCEConfig(temperature=0.2)),
    WeightedLossSpec(name="spread", weight=0.3),
    WeightedLossSpec(name="cosent", weight=0.5),
]

OBJECTIVES: Final[dict[str, Options]] = {
    "InfoNCE": options("infonce", learn_temperature=True),
    "InfoNCE, two directions": options("infonce", learn_temperature=True, directions=ALL[:2]),
    "InfoNCE, one partition": options("infonce", temperature=0.2, directions=ALL, partition="joint"),
    "InfoNCE, hardest": options("infonce", temperature=0.2, hardest=3, decides=True),
    "InfoNCE, filtered by margin": options(
        "infonce", temperature=0.2, false_negatives="filter", false_negative_margin=0.1, decides=True
    ),
    "InfoNCE, filtered by a teacher": options("infonce", temperature=0.2, false_negatives="filter_by_teacher"),
    "InfoNCE, hardness": options("infonce", temperature=0.2, hardness="all", hardness_strength=2.0),
    "InfoNCE, MaxSim": options("infonce", temperature=0.5, similarity="maxsim", directions=ALL[:2]),
    "Sigmoid": options("sigmoid"),
    "Sigmoid, positives by label": options("sigmoid", same="positive", bias=-1.0, learn_bias=False),
    "Triplet, hardest": options("triplet", decides=True),
    "Triplet, semi-hard": options("triplet", mining="semi_hard", decides=True),
    "Triplet, all": options("triplet", mining="all", soft_margin=True),
    "CoSENT": options("cosent", temperature=0.2),
    "AnglE": options("angle", temperature=0.2),
    "Multi-positive": options("multi_positive", learn_temperature=True, symmetric=True),
    "Spread, orthogonal": options("spread"),
    "Spread, uniformity": options("spread", kind="uniformity"),
    "Distillation, scores": options("distillation", temperature=0.5),
    "Distillation, teacher": options("distillation", source="teacher", temperature=0.5),
    "Distillation, margin MSE": options("distillation", kind="margin_mse"),
    "Distillation, MaxSim": options("distillation", source="teacher", temperature=0.5, similarity="maxsim"),
    "Embedding distillation, cosine": options("embedding_distillation", projection=True),
    "Embedding distillation, MSE": options("embedding_distillation", kind="mse", projection=True),
    "Combined": options("combined", losses=COMBINED),
    "InfoNCE, labels only": options("infonce", learn_temperature=True, one_sided="all"),
    "InfoNCE, some labels only": options("infonce", temperature=0.2, directions=ALL[:2], one_sided="some"),
    "Sigmoid, labels only": options("sigmoid", one_sided="all"),
    "Triplet, labels only, hardest": options("triplet", decides=True, one_sided="all"),
    "Triplet, labels only, all": options("triplet", mining="all", soft_margin=True, one_sided="some"),
    "Multi-positive, labels only": options("multi_positive", learn_temperature=True, one_sided="all"),
    "InfoNCE, texts with images": options("infonce", learn_temperature=True, directions=ALL[:2], mixed=True),
}

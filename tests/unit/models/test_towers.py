"""Which modules of a model of texts and images encode one modality alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module, ModuleDict, ModuleList

from vembed_fs2.embedding.model import EmbeddingModel, EncoderBatch
from vembed_fs2.errors import ConfigError
from vembed_fs2.models.auto import AutoModelConfig, create_auto_model
from vembed_fs2.models.auto.factory import find_towers
from vembed_fs2.models.composed import backbone
from vembed_fs2.models.composed.backbone import create_backbone
from vembed_fs2.models.family import FamilyFactory

CHINESE_CLIP: dict[str, Any] = {
    "model_type": "chinese_clip",
    "projection_dim": 8,
    "text_config": {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"intermediate_size": 16, "max_position_embeddings": 32},
    "vision_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    | {"image_size": 8, "patch_size": 4},
}


class Adapted(EmbeddingModel):
    """A text encoder with an adapter to the space of images, whose name begins with "image"."""

    modalities = frozenset({"text", "image"})

    embedding_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = ModuleDict({"embed": Linear(1, 4), "image_adapter": Linear(4, 4)})
        self.pixels = Linear(3, 4)

    def encode_text(self, batch: EncoderBatch) -> Tensor:
        assert batch.input_ids is not None
        states = self.text_encoder["embed"](batch.input_ids.float().unsqueeze(2)).mean(1)
        return self.text_encoder["image_adapter"](states)  # type: ignore[no-any-return]

    def encode_image(self, batch: EncoderBatch) -> Tensor:
        assert batch.pixel_values is not None
        return self.pixels(batch.pixel_values.mean((2, 3)))  # type: ignore[no-any-return]

    def layer_stacks(self) -> list[ModuleList]:
        return []


class AdaptedWithTowers(Adapted):
    def __init__(self) -> None:
        super().__init__()
        self.towers = {"text": ["text_encoder"], "image": ["pixels"]}


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let ``create_backbone`` find a family that creates models of a class."""

    def use(kls: type[EmbeddingModel]) -> None:
        class Resolver:
            def resolve(self, kind: object, *, key: str) -> FamilyFactory:
                return FamilyFactory(lambda config: kls(), supports_meta=True)

        monkeypatch.setattr(backbone, "get_resolver", Resolver)

    return use


@torch.no_grad()
def test_a_tower_keeps_parts_that_are_named_after_the_other_modality(register: Any) -> None:
    register(AdaptedWithTowers)

    text = create_backbone("adapted", None, "text")
    image = create_backbone("adapted", None, "image")

    assert text.left_out == ["pixels"]
    assert dict(text.model.named_children()).keys() == {"text_encoder"}
    assert text.model(EncoderBatch.of_text(torch.ones(2, 3, dtype=torch.int64))).values.shape == (2, 4)
    assert image.left_out == ["text_encoder"]
    assert dict(image.model.named_children()).keys() == {"pixels"}


def test_a_family_that_declares_no_towers_is_refused_by_name(register: Any) -> None:
    register(Adapted)

    with pytest.raises(ConfigError, match=r"text encoder of adapted models .* declare .* `towers` of Adapted"):
        create_backbone("adapted", None, "text")


def test_what_both_towers_use_is_kept(register: Any) -> None:
    class Shared(AdaptedWithTowers):
        def __init__(self) -> None:
            super().__init__()
            self.towers = {"text": ["text_encoder", "pixels"], "image": ["pixels"]}

    register(Shared)

    assert create_backbone("adapted", None, "text").left_out == []
    assert create_backbone("adapted", None, "image").left_out == ["text_encoder"]


def test_towers_of_a_wrapped_model_are_what_its_embeddings_depend_on() -> None:
    model = create_auto_model(AutoModelConfig(hf_config=CHINESE_CLIP))

    assert model.towers == {
        "text": ["wrapped.text_model", "wrapped.text_projection"],
        "image": ["wrapped.vision_model", "wrapped.visual_projection"],
    }


def test_modules_with_parameters_of_both_are_in_no_tower() -> None:
    model = Module()
    model.a, model.b = Linear(2, 2, bias=False), ModuleDict({"x": Linear(2, 2), "y": Linear(2, 2)})
    model.a2 = Linear(2, 2, bias=False)
    model.a2.weight = model.a.weight

    towers = find_towers(model, {"text": {"a.weight", "b.x.weight"}, "image": {"a.weight", "b.y.weight", "b.y.bias"}})

    assert towers == {"text": ["b.x"], "image": ["b.y"]}

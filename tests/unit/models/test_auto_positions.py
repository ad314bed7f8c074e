"""Which models of transformers count positions from the one after the padding's."""

from __future__ import annotations

import inspect

import pytest
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from vembed_fs2.models.auto.backbone import COUNT_FROM_PADDING, find_backbone


@pytest.mark.parametrize("model_type", sorted(COUNT_FROM_PADDING))
def test_models_that_are_named_do(model_type: str) -> None:
    module = inspect.getmodule(MODEL_MAPPING[CONFIG_MAPPING[model_type]])

    assert module is not None
    assert "create_position_ids_from_input_ids" in inspect.getsource(module)


@pytest.mark.parametrize(("model_type", "length"), [("electra", 40), ("lilt", 38), ("xmod", 38)])
def test_the_longest_text_leaves_the_padding_out(model_type: str, length: int) -> None:
    config = {"model_type": model_type, "max_position_embeddings": 40, "pad_token_id": 1}

    assert find_backbone(config).max_text_length == length

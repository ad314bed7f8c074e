"""Which tensors of a dict are cut with the tokens of a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Embedding

from vembed_fs2.gradcache import GradCache

ROWS, WIDTH = 6, 12

LENGTHS = [12, 3, 7, 5, 2, 9]


def role(width: int = WIDTH, seed: int = 0, **extra: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    mask = (torch.arange(width) < torch.tensor(LENGTHS).clamp(max=width)[:, None]).long()
    return {"input_ids": torch.randint(1, 50, (ROWS, width)) * mask, "attention_mask": mask, **extra}


def seen(extra: dict[str, Tensor], **options: Any) -> tuple[dict[str, set[tuple[int, ...]]], set[int]]:
    """The shapes of each tensor in the chunks, without their rows, and the widths of the chunks."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    widths = set()

    def encode(batch: dict[str, Tensor]) -> Tensor:
        widths.add(batch["input_ids"].size(1))
        for name, tensor in batch.items():
            shapes.setdefault(name, set()).add(tuple(tensor.shape[1:]))
        return batch["input_ids"].float().sum(1, keepdim=True)

    GradCache(encode, lambda x: x.sum(), chunk_tokens=16, **options)(role(**extra))
    return shapes, widths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize("tail", [(), (4,)])
def test_values_of_tokens_are_cut_whatever_their_type(dtype: torch.dtype, tail: tuple[int, ...]) -> None:
    shapes, widths = seen({"weights": torch.ones(ROWS, WIDTH, *tail, dtype=dtype)})
    assert len(widths) > 2
    assert shapes["weights"] == {(width, *tail) for width in widths}


@pytest.mark.parametrize("heads", [(), (1,), (2,)])
@pytest.mark.parametrize(
    ("name", "dtype"), [("pairs", torch.bool), ("extra_mask", torch.float32), ("position_bias", torch.float32)]
)
def test_masks_of_pairs_are_cut_on_both_sides(heads: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    shapes, widths = seen({name: torch.ones(ROWS, *heads, WIDTH, WIDTH, dtype=dtype)})
    assert shapes[name] == {(*heads, width, width) for width in widths}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("labels", (ROWS,)),
        ("features", (ROWS, 5)),
        ("states", (ROWS, 3, WIDTH)),
        ("pixel_values", (ROWS, WIDTH, 2, 2)),
        ("pixel_values", (ROWS, WIDTH, 8)),
        ("pixel_mask", (ROWS, WIDTH, WIDTH)),
        ("image_sizes", (ROWS, WIDTH)),
        ("photos", (ROWS, 1, WIDTH, WIDTH)),
    ],
)
def test_what_is_not_of_tokens_is_whole(name: str, shape: tuple[int, ...]) -> None:
    shapes, _ = seen({name: torch.ones(shape)})
    assert shapes[name] == {shape[1:]}


def test_the_other_role_shows_that_a_width_is_an_accident() -> None:
    shapes = set()

    def encode(batch: dict[str, Tensor]) -> Tensor:
        shapes.add(tuple(batch["features"].shape[1:]))
        return batch["features"]

    features = torch.randn(2, ROWS, WIDTH)
    step = GradCache(
        encode, lambda x, y: (x - features[0]).abs().sum() + (y - features[1]).abs().sum(), chunk_tokens=16
    )
    assert float(step(role(features=features[0]), role(width=8, features=features[1])).detach()) == 0
    assert shapes == {(WIDTH,)}


def test_token_dims_says_what_sizes_cannot() -> None:
    extra = {
        "features": torch.ones(ROWS, WIDTH),
        "bias": torch.ones(ROWS, WIDTH, WIDTH),
        "late": torch.ones(ROWS, 3, WIDTH),
    }
    shapes, widths = seen(extra, token_dims={"features": (), "bias": (1,), "late": (2,), "absent": (1,)})
    assert shapes["features"] == {(WIDTH,)}
    assert shapes["bias"] == {(width, WIDTH) for width in widths}
    assert shapes["late"] == {(3, width) for width in widths}

    with pytest.raises(ValueError, match=r"dimension 1 of `late` counts tokens, but `attention_mask` is \[6, 12\]"):
        seen(extra, token_dims={"late": (1,)})
    with pytest.raises(ValueError, match="dimension 0 of `late`"):
        seen(extra, token_dims={"late": (0,)})


@pytest.mark.parametrize("budget", ["all", 0])
def test_the_gradient_of_token_weights_equals_the_plain_step(budget: Any) -> None:
    torch.manual_seed(3)
    table = Embedding(50, 8).double()

    def encode(batch: dict[str, Tensor]) -> Tensor:
        weights = (batch["weights"] * batch["attention_mask"]).unsqueeze(2)
        return (table(batch["input_ids"]) * weights).sum(1) / weights.sum(1)

    def contrast(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T).logsumexp(1).sum()

    # Also what stands at padding, which roles of another width are filled up with.
    widths = (WIDTH, 8)
    roles = [role(w, w, weights=torch.rand(ROWS, w, dtype=torch.float64) + 0.1) for w in widths]
    for batch in roles:
        batch["weights"].requires_grad_()

    def gradients(loss: Tensor) -> list[Tensor]:
        for tensor in (table.weight, *(batch["weights"] for batch in roles)):
            tensor.grad = None
        loss.backward()
        return [t.grad for t in (table.weight, *(batch["weights"] for batch in roles)) if t.grad is not None]

    want = gradients(contrast(*map(encode, roles)))
    got = gradients(GradCache(encode, contrast, chunk_tokens=16, activation_budget=budget)(*roles))
    assert len(want) == len(got) == 3
    for x, y in zip(want, got):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-14)

"""A cached loss and an ordinary one, or two cached ones, through one data parallel module in one backward pass."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Linear, Module, ReLU, Sequential
from torch.nn.parallel import DistributedDataParallel

from vembed_fs2.gradcache import GradCache

from .spawn import run_ranks

WRAPS = ("ddp", "ddp_static", "ddp_unused", "ddp_view", "fsdp")

ORDERS = ("ordinary first", "cached first", "two cached", "ordinary twice", "ordinary in the loss")

CASES = [
    *product(WRAPS, ORDERS, ["all", 0]),
    *product(["ddp", "ddp_view"], ["cached first, accumulated", "ordinary first, accumulated"], [0]),
]


def create_module() -> Module:
    torch.manual_seed(7)
    return Sequential(Linear(4, 8), ReLU(), Linear(8, 4)).double()


def wrap(kind: str) -> Module:
    module = create_module()
    if kind == "fsdp":
        for layer in (module[0], module[2], module):  # type: ignore[index]
            fully_shard(layer)
        return module
    return DistributedDataParallel(
        module,
        static_graph=kind == "ddp_static",
        find_unused_parameters=kind == "ddp_unused",
        gradient_as_bucket_view=kind == "ddp_view",
    )


def rows_of(rank: int, number: int) -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * number + rank))


def contrast(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).logsumexp(1).sum()


def total_loss(module: Any, order: str, rank: int, number: int, step: GradCache | None) -> Tensor:
    """
    :param step: computes the contrastive part; without it, all of it is plain.
    """
    a, b, c = (rows_of(rank, 3 * number + i) for i in range(3))

    def cached(x: Tensor, y: Tensor, loss: Any = contrast) -> Tensor:
        if step is None:
            return loss(module(x), module(y))
        step.rebind(lambda chunk: module(chunk["x"]), loss)
        return step({"x": x}, {"x": y})

    def ordinary() -> Tensor:
        return module(c).pow(2).sum()

    if order.startswith("ordinary first"):
        return ordinary() + cached(a, b)
    if order.startswith("cached first"):
        return cached(a, b) + ordinary()
    if order == "two cached":
        return cached(a, b) + 3 * cached(b, c)
    if order == "ordinary twice":
        first = module(torch.cat([a, c])).cos().sum()
        return first + cached(a, b)
    return cached(a, b, lambda x, y: contrast(x, y) + ordinary())


def gradients(module: Module) -> list[Tensor]:
    found = [parameter.grad for parameter in module.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad.clone() for grad in found if grad is not None]


def expected(order: str, world_size: int) -> list[Tensor]:
    """The mean over ranks of the plain gradient, of two steps that accumulate."""
    module = create_module()
    for rank, number in product(range(world_size), range(2)):
        (total_loss(module, order, rank, number, None) / world_size).backward()
    return gradients(module)


def compare_all(rank: int, world_size: int, cases: list[tuple[Any, ...]]) -> list[float | str]:
    dist.init_process_group("gloo")
    errors: list[float | str] = []
    for kind, order, budget in cases:
        module = wrap(kind)
        step = GradCache([], contrast, chunk_tokens=4, activation_budget=budget)
        try:
            for number in range(2):
                # The first step of two that accumulate may leave the reduction to the second.
                with module.no_sync() if number == 0 and "accumulated" in order else nullcontext():  # type: ignore[operator]
                    total_loss(module, order, rank, number, step).backward()
        except Exception as ex:
            errors.append(f"{type(ex).__name__}: {ex}")
            continue
        want, got = expected(order, world_size), gradients(module)
        errors.append(max(float((x - y).norm() / x.norm()) for x, y in zip(want, got)))
    dist.destroy_process_group()
    return errors


@pytest.fixture(scope="module")
def measured() -> dict[tuple[Any, ...], list[float | str]]:
    return dict(zip(CASES, zip(*run_ranks(compare_all, 2, 2, CASES))))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_one_backward_pass_of_several_losses_is_exact(
    case: tuple[Any, ...], measured: dict[tuple[Any, ...], list[float | str]]
) -> None:
    for error in measured[case]:
        assert isinstance(error, float), error
        assert error < 1e-12

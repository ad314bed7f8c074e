"""A number that is not finite on one rank ends the training on all ranks at the same point, before a checkpoint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fairseq2.metrics import MetricBag
from fairseq2.metrics.aggregation import Mean, Sum
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vembed_fs2.errors import VembedError
from vembed_fs2.recipes.train.finite import FiniteGuard

from .spawn import run_ranks
from .steps import CPU

NAN, INF = float("nan"), float("inf")


class Run:
    """A trainer that notes what it is asked for."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        inner: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.model: Any = DistributedDataParallel(inner) if kind == "ddp" else fully_shard(inner)
        self.calls: list[str] = []
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.bag = MetricBag(device=CPU)
        self.bag.add("loss", Sum())
        self.bag.add("grad_norm", Mean())
        self.trainer: Any = SimpleNamespace(
            _save_checkpoint=lambda blocking: self.calls.append("save"),
            _publish_metrics=lambda: self.calls.append("publish"),
            _maybe_complete_checkpoint_save_operation=lambda: self.calls.append("complete"),
        )
        self.guard = FiniteGuard(self.model)
        self.guard.bag = self.bag
        self.guard.install(self.trainer, self.optimizer)

    def local(self, index: int) -> Any:
        parameter = list(self.model.parameters())[index].detach()
        return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def break_run(run: Run, case: str, rank: int) -> None:
    """What happens on rank 1 only, but for FSDP2's shards, of which each rank has its own."""
    if case == "flagged":
        run.guard.see(torch.tensor(NAN))  # A step that was skipped.
    if rank == 0:
        return
    if case == "loss":
        run.bag.get("loss", Sum).update(torch.tensor(NAN))
    elif case == "gradient":
        run.bag.get("grad_norm", Mean).update(torch.tensor(INF))
    elif case == "weights":
        run.local(5)[0] = NAN
        run.local(2)[0] = INF
    elif case == "optimizer":
        state = run.optimizer.state[list(run.model.parameters())[3]]["exp_avg_sq"]
        (state.to_local() if hasattr(state, "to_local") else state)[0] = INF
    elif case == "first":
        run.local(4)[0] = NAN
        run.guard.see(torch.tensor(NAN))
        for index in range(6):
            run.local(index).fill_(NAN)
        run.bag.get("loss", Sum).update(torch.tensor(NAN))


CASES = ["sound", "flagged", "loss", "gradient", "weights", "optimizer", "first"]


def check_all(rank: int, kind: str) -> dict[str, tuple[str, list[str]]]:
    from .steps import open_gangs

    open_gangs(sharded=kind == "fsdp")
    found = {}
    for case in CASES:
        run = Run(kind)
        break_run(run, case, rank)
        message = ""
        for action in (run.trainer._publish_metrics, lambda run=run: run.trainer._save_checkpoint(False)):
            try:
                action()
            except VembedError as ex:
                message = str(ex)
                break
        found[case] = (message, run.calls)
    return found


def expect(found: dict[str, tuple[str, list[str]]]) -> None:
    for case in ("sound", "flagged"):
        assert found[case] == ("", ["publish", "save"])
    for case, start in (
        ("loss", "The loss is nan: the training has diverged. The weights are finite."),
        ("gradient", "The gradient is inf: the training has diverged. The weights are finite."),
        ("first", "The loss is nan: the training has diverged. `2.weight` is the first parameter that is not finite."),
    ):
        message, calls = found[case]
        assert message.startswith(start), message
        assert calls == ["complete"]
    for case, start in (
        ("weights", "The weights are not finite: the training has diverged. `1.weight` is the first"),
        (
            "optimizer",
            "The optimizer's state is not finite: the training has diverged. The optimizer's averages of `1.bi",
        ),
    ):
        message, calls = found[case]
        assert message.startswith(start), message
        assert calls == ["publish", "complete"]


def test_ddp_ends_on_all_ranks() -> None:
    for found in run_ranks(check_all, 2, "ddp"):
        expect(found)


def test_fsdp_ends_on_all_ranks() -> None:
    for found in run_ranks(check_all, 2, "fsdp"):
        expect(found)

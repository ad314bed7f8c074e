"""The metrics of objectives, whose names only the objectives know."""

from __future__ import annotations

import torch
from fairseq2.metrics import MetricBag

from vembed_fs2.recipes.metrics import SumsByName


def test_sums_are_kept_by_name_and_merged_over_ranks() -> None:
    ranks = [SumsByName() for _ in range(3)]
    for number, metric in enumerate(ranks):
        for _ in range(2):
            metric.update({"accuracy": torch.tensor(number), "loss@8": torch.tensor(0.5, dtype=torch.bfloat16)})
    merged = ranks[0].merge_state(ranks[1:])
    assert {name: float(value) for name, value in merged.compute().items()} == {"accuracy": 6.0, "loss@8": 3.0}


def test_a_checkpoint_between_two_reports_holds_the_sums() -> None:
    bag, resumed = (MetricBag(torch.device("cpu")) for _ in range(2))
    for each in (bag, resumed):
        each.add("objective", SumsByName())
    resumed.load_state_dict(bag.state_dict())  # Nothing yet.
    bag.get("objective", SumsByName).update({"accuracy": torch.tensor(2)})
    resumed.load_state_dict(bag.state_dict())
    resumed.get("objective", SumsByName).update({"accuracy": torch.tensor(3)})
    assert float(resumed.get("objective", SumsByName).compute()["accuracy"]) == 5.0
    assert float(bag.get("objective", SumsByName).compute()["accuracy"]) == 2.0
    resumed.reset_metrics()
    assert resumed.get("objective", SumsByName).compute() == {}


def test_a_step_that_is_rolled_back_counts_nothing() -> None:
    bag = MetricBag(torch.device("cpu"))
    bag.add("objective", SumsByName())
    bag.get("objective", SumsByName).update({"accuracy": torch.tensor(2)})
    bag.begin_updates()
    bag.get("objective", SumsByName).update({"accuracy": torch.tensor(7)})
    bag.rollback_updates()
    assert float(bag.get("objective", SumsByName).compute()["accuracy"]) == 2.0

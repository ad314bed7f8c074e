"""The gradient of a step is that of the plain step, whatever changes how it is computed (``docs/exactness.md``)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path

import pytest

from vembed_fs2.losses import LOSSES

from .exactness import LEVELS, Case, errors_of, full, is_possible, pairwise, tolerance
from .objectives import OBJECTIVES

DOC = Path(__file__).parents[2] / "docs" / "exactness.md"


def assert_exact(cases: Sequence[Case]) -> None:
    results = list(errors_of(cases))
    assert len(results) == len(cases)
    wrong = [(error, case) for case, error in results if not error <= tolerance(case)]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("parallel", LEVELS["parallel"])
def test_every_two_levels_together(parallel: str) -> None:
    assert_exact([case for case in pairwise() if case.parallel == parallel])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", LEVELS["parallel"])
def test_all_combinations(parallel: str) -> None:
    assert_exact([case for case in full() if case.parallel == parallel])


def test_the_cases_hold_every_two_levels() -> None:
    cases = pairwise()
    for (i, first), (j, second) in combinations(enumerate(LEVELS), 2):
        met = {(case[i], case[j]) for case in cases}
        possible = {(a, b) for a, b in product(LEVELS[first], LEVELS[second])}
        if {first, second} == {"parallel", "dropout"}:
            possible.remove(("TP 2", 0.1) if first == "parallel" else (0.1, "TP 2"))
        assert met == possible, (first, second)
    assert all(is_possible(case) for case in cases)


def test_every_registered_objective_is_among_them() -> None:
    # Matryoshka is a level of its own.
    assert {options.name for options in OBJECTIVES.values()} == LOSSES.keys() - {"matryoshka"}


def test_the_table_names_every_objective() -> None:
    text = DOC.read_text(encoding="utf-8")
    for name in OBJECTIVES:
        assert f"| {name} |" in text
        assert f"| {name}, Matryoshka |" in text

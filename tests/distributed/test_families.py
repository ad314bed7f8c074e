"""Every family trains on two ranks, with the gradient cache and activation checkpointing, as on one without."""

from __future__ import annotations

from itertools import product

import pytest

from .families import MODES, errors_on_rank, load_cases
from .spawn import run_ranks

CASES, BROKEN = load_cases()


def test_all_cases_can_be_imported() -> None:
    assert not BROKEN, "\n".join(BROKEN.values())


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[tuple[str, str], list[float | str]]:
    """What each rank found. All that is selected runs in the same two processes: starting them takes most time."""
    selected = {item.name for item in request.session.items}
    jobs = [job for job in product(MODES, CASES) if any("-".join(job) in name for name in selected)]
    return dict(zip(jobs, zip(*run_ranks(errors_on_rank, 2, jobs))))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_gradient_equals_that_of_the_plain_step(
    mode: str, case: str, results: dict[tuple[str, str], list[float | str]]
) -> None:
    for result in results[mode, case]:
        assert not isinstance(result, str), result
        assert result <= 1e-5

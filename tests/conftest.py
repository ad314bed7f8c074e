"""What all tests share."""

from __future__ import annotations

import os

# Several multi-threaded torch programs at once are many times slower than one
# after the other; child processes inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FAIRSEQ2_NO_PROGRESS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

import vembed_fs2  # noqa: F401  (loads libsndfile before any test imports fairseq2)

# `make test` tries the same examples each time: a change must not fail for an
# example that it has nothing to do with. `make test-full` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)

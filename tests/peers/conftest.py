"""Runs the comparison: other libraries write, we read and write, they read.

Both environments run the same program: this one, and one with the newest versions,
which `make test-peers` builds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from .compare import Peer, Results, compare
from .table import make_table, put_table

NEWEST = Path(os.environ.get("PEERS_PYTHON", Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"))

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="the page whose table is replaced by what is found")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Results:
    if not NEWEST.is_file():
        pytest.skip(f"{NEWEST} does not exist: `make test-peers` builds the environment of the newest versions.")

    root = tmp_path_factory.mktemp("peers")
    found = compare(root, [Peer("present", Path(sys.executable)), Peer("newest", NEWEST)])
    pytestconfig.stash[RESULTS] = found

    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, and put it into the page."""
    if (found := config.stash.get(RESULTS, None)) is None:
        return

    table = make_table(found)
    terminalreporter.write_line(f"\n{table}")
    if (page := config.getoption("--table")) is not None:
        put_table(table, page)

"""The processes of a gang end as one, and one of them says why."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from vembed_fs2.console import Screen
from vembed_fs2.recipes.launch import _run_fairseq2, advice_of
from vembed_fs2.recipes.processes import RESUME, Outcome, call_processes, run_processes


@pytest.mark.parametrize(
    ("rank_1", "status", "says"),
    [
        ("pass", 0, []),
        ("sys.exit(3)", 3, ["rank 1 failed", "logs/rank_1.log"]),
        ("os.kill(os.getpid(), 9)", 137, ["rank 1 was killed by SIGKILL", "run the same command again"]),
        ("if claim_error(2): print('error: mine', file=sys.stderr)\n    sys.exit(2)", 2, ["error: mine"]),
    ],
)
def test_processes_end_as_one(rank_1: str, status: int, says: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The other rank waits for ever, as in a collective; when it is told so late, it keeps silent."""
    waits = "while not is_error_claimed(): time.sleep(0.01)\n    sys.exit(0 if claim_error(1) else 1)"
    code = (
        "import os, sys, time\n"
        "from vembed_fs2.recipes.processes import claim_error, is_error_claimed\n"
        f"if os.environ['RANK'] == '1':\n    {rank_1}\n"
        f"elif {status}:\n    {waits}\n"
    )

    assert run_processes([sys.executable, "-c", code], 2) == status

    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (1 if status else 0)
    assert all(text in errors[0] for text in says)


def test_what_to_do_is_the_recipes_to_say(capfd: pytest.CaptureFixture[str]) -> None:
    """And what the processes print can be kept apart from what the launcher's own process does."""
    code = "import os; print('from a library', flush=True); os.kill(os.getpid(), 9)"

    assert run_processes([sys.executable, "-c", code], 1, advice="", stdout=sys.stderr.fileno()) == 137

    printed = capfd.readouterr()
    assert printed.out == ""
    assert "from a library" in printed.err
    assert printed.err.splitlines()[-1] == ("error: the process of rank 0 was killed by SIGKILL. Was the memory full?")
    assert [advice_of(f"vembed_fs2.recipes.{name}") for name in ("train", "evaluate")] == [RESUME, ""]


def test_processes_end_with_a_killed_launcher(tmp_path: Path) -> None:
    worker = f"import os, time; open({str(tmp_path)!r} + '/' + str(os.getpid()), 'w').close(); time.sleep(60)"
    code = "import sys; from vembed_fs2.recipes.processes import run_processes; "
    code += f"run_processes([sys.executable, '-c', {worker!r}], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)

    launcher.send_signal(signal.SIGKILL)
    launcher.wait()

    deadline = time.monotonic() + 10
    while any(_is_running(int(file.name)) for file in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        # The third field is the state; what has ended may wait for someone to ask how.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


LOSES = "defer_error(f'rank {rank} hears nothing.'); sys.exit(1)"


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "status", "says"),
    [
        ("sys.exit(143)", "sys.exit(143)", 143, []),
        (LOSES, "time.sleep(0.2); sys.exit(3)", 3, ["the process of rank 1 failed; logs/rank_1.log says why."]),
        (LOSES, "time.sleep(0.2); os.kill(os.getpid(), 9)", 137, ["the process of rank 1 was killed by SIGKILL."]),
        ("time.sleep(0.2); " + LOSES, "sys.exit(143)", 1, ["rank 0 hears nothing. logs/rank_0.log says more."]),
        (LOSES, LOSES, 1, ["hears nothing. logs/rank_"]),
        (LOSES, "time.sleep(60)", 1, ["rank 0 hears nothing. logs/rank_0.log says more."]),
    ],
)
def test_the_launcher_names_the_process_that_is_to_blame(
    rank_0: str, rank_1: str, status: int, says: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """One that has only lost its connection to another leaves it to the launcher to say what happened."""
    code = (
        "import os, sys, time\n"
        "from vembed_fs2.recipes.processes import defer_error\n"
        "rank = os.environ['RANK']\n"
        f"if rank == '0':\n    {rank_0}\n{rank_1}\n"
    )

    assert run_processes([sys.executable, "-c", code], 2) == status

    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == len(says)
    assert all(text in error and error.startswith("error: ") for text, error in zip(says, errors))


GONE = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40123"
SIZES = "[enforce fail at ../gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 16 vs 8"


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError(GONE), True),
        (dist.DistNetworkError("Broken pipe"), True),
        (RuntimeError(SIZES), False),
        (RuntimeError("my loss: connection closed by peer"), False),
        (ValueError(GONE), False),
    ],
)
def test_only_a_lost_connection_is_left_to_the_launcher(
    error: Exception, is_lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(import_module("fairseq2.recipe.run"), "run", fail)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(logging.getLogger("fairseq2"), "propagate", True)
    arguments: Any = SimpleNamespace(
        output_dir=tmp_path, checkpoint_dir=None, no_rich=True, verbose=False, traceback=False
    )
    recipe: Any = SimpleNamespace(screen=Screen(shown=False))
    monkeypatch.setenv("RANK", "0")
    for launcher in (False, True):
        if launcher:
            monkeypatch.setenv("VEMBED_ERROR_CLAIM", str(tmp_path / "error"))
        with pytest.raises(SystemExit):
            _run_fairseq2(recipe, None, arguments)
        assert logging.getLogger("fairseq2").propagate is not (is_lost and launcher)

    deferred = [file.read_text() for file in tmp_path.glob("error.rank_0")]
    assert deferred == ([f"the process of rank 0 cannot communicate with the others: {error}."] if is_lost else [])


CALLS = (
    "import json, os, sys, time\n"
    "from vembed_fs2.recipes.processes import claim_error\n"
    "print('gr\\u00fc\\u00df', os.environ.get('RANK'), flush=True); print('to stderr', file=sys.stderr, flush=True)\n"
)


def call(code: str, count: int | None = None) -> tuple[Outcome, str]:
    printed: list[str] = []
    outcome = call_processes([sys.executable, "-c", CALLS + code], count, advice="Try again.", echo=printed.append)
    return outcome, "".join(printed)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", Outcome(0)),
        ("if claim_error(2, 'a report'): print('error')\nsys.exit(2)", Outcome(2, "a report")),
        ("sys.exit(1)", Outcome(1)),
        (
            "os.kill(os.getpid(), 9)",
            Outcome(137, "", "the process of rank 0 was killed by SIGKILL. Was the memory full? Try again."),
        ),
    ],
)
def test_a_caller_in_python_gets_what_happened(
    code: str, expected: Outcome, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the processes print, in its own thread, whatever thread that is."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    results = []
    thread = threading.Thread(target=lambda: results.append(call(code)))
    thread.start()
    thread.join()

    assert results == [(expected, "grüß None\nto stderr\n")]
    assert capfd.readouterr() == ("", "")


def test_the_last_that_is_printed_is_not_lost() -> None:
    outcome, printed = call("os.close(0); print('x' * 300_000)", 2)
    assert outcome == Outcome(0)
    assert printed.count("x") == 600_000
    assert {"grüß 0", "grüß 1"} <= set(printed.replace("x", "").split("\n"))


def test_a_caller_passes_signals_on_and_has_its_own_handlers_back() -> None:
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    code = "import signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    code += "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"

    outcome, _ = call(code)

    assert outcome == Outcome(143, signum=signal.SIGTERM)
    assert {s: signal.getsignal(s) for s in before} == before

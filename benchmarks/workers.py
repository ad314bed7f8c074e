"""Runs single steps of two environments in turns, so that both meet the same machine.

A worker is a process that waits for the name of a step on its standard input,
runs it, and writes what it measured as a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Measured:
    """One step."""

    loss: float = float("nan")
    grad_norm: float = float("nan")
    """The L2 norm of the gradient of all parameters."""

    seconds: float = float("nan")
    peak: int | None = None
    """Bytes above what the process had when the model was loaded; only where it was asked for."""

    kept: float | None = None
    """The fraction of graphs that were kept, for our steps."""

    error: str | None = None


class Worker:
    """The other process, as the parent sees it."""

    def __init__(self, python: str | Path, script: str, settings: Mapping[str, Any]) -> None:
        command = [str(python), "-W", "ignore", str(Path(__file__).with_name(script)), json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._name = script
        self._about: dict[str, Any] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    @property
    def about(self) -> dict[str, Any]:
        """What the worker says of itself when it is ready: its steps, tokens and versions."""
        if self._about is None:
            self._about = self._read()
        return self._about

    def run(self, step: str, *, memory: bool = False) -> Measured:
        """Run a step.

        :param memory: measure memory instead of time: free memory is given back before, which costs time.
        """
        return Measured(**self.ask({"step": step, "memory": memory}))

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request; return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._name} ended with status {self._process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Step:
    """A step of a worker: runs forward and backward, returns the loss."""

    run: Callable[[], torch.Tensor]
    kept: Callable[[], float] | None = None


def open_line() -> Callable[[Mapping[str, Any]], None]:
    """Return what sends an answer to the parent. What libraries print goes elsewhere from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    return answer


def serve(steps: Mapping[str, Step], model: torch.nn.Module, device: torch.device, about: Mapping[str, Any]) -> None:
    """Answer the parent until it closes the line."""
    import torch
    from measure import PeakMemory, timed

    answer = open_line()
    peak = PeakMemory(device)
    answer({**about, "steps": list(steps)})
    for line in sys.stdin:
        request = json.loads(line)
        step = steps[request["step"]]
        measured = Measured()
        if request["memory"]:
            peak.reset()
        try:
            if device.type == "cuda" and not request["memory"]:
                step.run()  # Takes memory from the device again, see below.
                model.zero_grad(set_to_none=True)
            measured.seconds, loss = timed(device, step.run)
            measured.loss = float(loss)
            measured.peak = peak.peak() if request["memory"] else None
            measured.kept = step.kept() if step.kept is not None else None
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            measured.grad_norm = float(torch.nn.utils.get_total_norm(grads))
            del loss, grads
        except torch.OutOfMemoryError:
            measured.error = "out of memory"
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # The other process has the same device.
        answer(asdict(measured))

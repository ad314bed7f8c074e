"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, write a checkpoint, exit."""

from __future__ import annotations

import logging
import os
import signal
import time
from types import FrameType
from typing import Final

import torch
import torch.distributed as dist
from fairseq2.trainer import Trainer

from vembed_fs2.fairseq2_seams import override_stop_request, stop_after_step

log = logging.getLogger("vembed_fs2")

_SAME_REQUEST: Final = 1.0
"""Seconds in which a second signal is the first one again: a terminal sends Ctrl-C to all, a launcher passes it on."""


_AGAIN: Final = "A second signal ends the run at once, without a checkpoint."


class StopRequest:
    """Asks the trainer to stop after the current step, on all ranks at the same one."""

    def __init__(self) -> None:
        self.signum = 0
        """The signal that stopped the run; 0 if none did."""

        self._is_first = True
        self._received = 0
        self._received_at = 0.0
        self._trainer: Trainer | None = None
        self._group: dist.ProcessGroup | None = None

    def install(self, trainer: Trainer) -> None:
        """Handle SIGINT, SIGTERM and SIGUSR1 from now on. A second one ends the process at once."""
        self._trainer = trainer
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._is_first = dist.get_rank() == 0
            # On the CPU, so that asking costs no synchronisation with a GPU.
            self._group = dist.new_group(backend="gloo")

        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

        # fairseq2 handles SIGUSR1 itself, which Slurm sends before a job's time is over, and asks the trainer to stop.
        override_stop_request(trainer, lambda: self._handle(signal.SIGUSR1, None))

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._received_at = signum, now
            if self._is_first:  # Not by a logger, which may be in the midst of a line; a validation may take long.
                os.write(2, f"\n{signal.Signals(signum).name}: stopping after this step. {_AGAIN}\n".encode())
        elif now - self._received_at > _SAME_REQUEST:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)

    def poll(self) -> None:
        """Find out whether any rank was asked to stop. Called by all ranks at the start of a step."""
        if self.signum:
            return

        received = self._received
        if self._group is not None:
            flag = torch.tensor([received])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            received = int(flag)

        if not received or self._trainer is None:
            return

        self.signum = received
        log.warning("%s received. Writing a checkpoint, then stopping.", signal.Signals(received).name)
        stop_after_step(self._trainer)

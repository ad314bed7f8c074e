"""A training run that is done: its metrics, its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vembed_fs2.errors import VembedError
from vembed_fs2.files import check_new_folder
from vembed_fs2.formats.registry import get_writer
from vembed_fs2.inference.embedder import Embedder

Checkpoint: TypeAlias = Literal["best", "last"] | int
"""The best one by ``regime.score_metric`` (the last one, if none was scored), the last one, or that of a step."""


@dataclass(frozen=True)
class RunMetrics:
    """What a run has measured, under the names that its log has for them (``"Loss"``, ``"nDCG@10"``)."""

    train: Mapping[int, Mapping[str, Any]]
    """The reports of the training, by step."""

    valid: Mapping[int, Mapping[str, Any]]
    """The validations, by step; empty if there was none."""

    @property
    def final(self) -> dict[str, Any]:
        """The last report of the training, with the last validation."""
        last = [list(reports.values())[-1] for reports in (self.valid, self.train) if reports]
        return {name: value for report in last for name, value in report.items()}


class TrainingRun:
    """The folder of a run."""

    def __init__(self, folder: str | Path) -> None:
        """
        :param folder: what ``fairseq2 vembed train`` or :func:`vembed_fs2.train` has written.
        :raises VembedError: it holds no checkpoint.
        """
        self.folder = Path(folder)
        if not self.steps:
            raise VembedError(f"{self.folder} has no checkpoint of a run.")

    def __repr__(self) -> str:
        return f"TrainingRun({str(self.folder)!r}, steps {', '.join(map(str, self.steps))})"

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint."""
        folders = self.folder.joinpath("checkpoints").glob("step_*")
        return sorted(int(path.name[5:]) for path in folders if path.name[5:].isdigit())

    @property
    def metrics(self) -> RunMetrics:
        """What was measured; empty if ``common.metric_recorders.jsonl`` is off."""
        return RunMetrics(*(_read_reports(self.folder / "metrics" / f"{name}.jsonl") for name in ("train", "valid")))

    def embedder(self, checkpoint: Checkpoint = "best", **options: Any) -> Embedder:
        """Load the trained model.

        :param options: see :meth:`vembed_fs2.Embedder.load`.
        :raises VembedError: there is no such checkpoint, or the model cannot be loaded.
        """
        return Embedder.load(self._checkpoint_folder(checkpoint), **options)

    def export(
        self, folder: str | Path, layout: str = "sentence-transformers", *, checkpoint: Checkpoint = "best"
    ) -> Path:
        """Write the trained model for other libraries, as ``fairseq2 vembed export`` does.

        :param folder: must not exist, or be empty.
        :param layout: ``sentence-transformers``, ``hf`` for transformers, ``open_clip``, or a plugin's.
        :returns: ``folder``.
        :raises VembedError: the layout cannot express the model, or the folder cannot be written.
        """
        path = Path(folder)
        check_new_folder(path)
        write = get_writer(layout)

        write(self.embedder(checkpoint, device="cpu"), path)
        return path

    def _checkpoint_folder(self, checkpoint: Checkpoint) -> Path:
        if checkpoint == "best":
            return self.folder

        steps = self.steps
        step = steps[-1] if checkpoint == "last" else checkpoint
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise VembedError(f"`checkpoint` must be 'best', 'last' or one of {known}, but is {checkpoint!r}.")
        return self.folder / "checkpoints" / f"step_{step}"


def _read_reports(file: Path) -> dict[int, dict[str, Any]]:
    """Read the reports of each step. A run that was killed and resumed has reported some steps twice."""
    reports: dict[int, dict[str, Any]] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        if line.endswith("}"):  # Else it was cut off.
            report = json.loads(line)
            reports.pop(report["Step"], None)
            reports[report["Step"]] = report

    return reports

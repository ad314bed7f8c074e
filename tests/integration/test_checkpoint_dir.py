"""A run that writes its checkpoints elsewhere is used and resumed as any other."""

from __future__ import annotations

from pathlib import Path

from tests.integration.command_line import run_all


def test_a_run_with_its_checkpoints_elsewhere_is_used_by_either_folder(
    tmp_path: Path, bert_folder: Path, texts: Path
) -> None:
    out, checkpoints = tmp_path / "run", tmp_path / "disk" / "checkpoints"
    options = ["regime.checkpoint_every_n_steps=1", "regime.publish_metrics_every_n_steps=1", "dataset.batch_size=8"]
    config = ["--config", f"model.path={bert_folder}", f"dataset.paths=[{texts}]", *options]
    train = ["train", str(out), "--no-rich"]

    results = run_all(
        [
            [*train, "--checkpoint-dir", str(checkpoints), *config, "regime.num_steps=1"],
            *(["evaluate", str(path), str(texts)] for path in (out, checkpoints, checkpoints / "step_1")),
            [*train, *config, "regime.num_steps=2"],
        ]
    )

    assert [result.status for result in results] == [0] * 5, "\n".join(result.output[-2000:] for result in results)
    assert "from step 1" in results[-1].output
    assert checkpoints.joinpath("step_2").is_dir()

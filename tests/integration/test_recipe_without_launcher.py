"""A recipe that fairseq2 runs itself, from somebody's own program."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.forks import run_forks
from tests.integration.command_line import environment, steps


def train(model: Path, data: Path, folder: Path) -> None:
    from fairseq2.recipe.run import run

    from vembed_fs2.losses import InfoNCEConfig
    from vembed_fs2.recipes.train.config import TrainConfig
    from vembed_fs2.recipes.train.recipe import create_recipe

    config = TrainConfig()
    config.model.path = model
    config.dataset.paths = [data]
    config.dataset.batch_size = 16
    config.valid.paths = [data]
    config.loss.config = InfoNCEConfig(learn_temperature=True)
    config.regime.num_steps = 2
    run(create_recipe(), config, folder, no_rich=True)


def test_fairseq2_runs_the_training_recipe(bert_folder: Path, texts: Path, tmp_path: Path) -> None:
    from vembed_fs2.inference.embedder import Embedder

    folder = tmp_path / "run"
    run_forks(train, bert_folder, texts, folder, environments=[environment()]).expect(0)

    assert steps(folder) == [2]
    embedder = Embedder.load(folder)
    assert np.isfinite(embedder.encode(["red green"])).all()
    assert embedder.model.logit_scale is not None

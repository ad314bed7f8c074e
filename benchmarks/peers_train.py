"""Worker of `quality.py`: fine-tunes with the trainer of sentence-transformers, in an environment of its own.

Reads its settings as JSON from the command line, and writes the model and
`training.json` to a folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)


def main() -> None:
    settings = json.loads(sys.argv[1])
    model = SentenceTransformer(settings["model"], device=settings["device"], backend="torch")
    out, own_length = Path(settings["out"]), model.max_seq_length
    model.max_seq_length = settings["max_length"] or own_length
    trainer = _Trainer(
        factors=settings["lr_factors"],
        model=model,
        args=training_arguments(settings, out),
        train_dataset=read_rows(settings),
        loss=make_loss(model, settings),
    )
    seconds = trainer.train().metrics["train_runtime"]
    model.max_seq_length = own_length
    model.save(str(out / "model"))
    about = {"name": f"sentence-transformers {sentence_transformers.__version__}", "seconds": seconds}
    out.joinpath("training.json").write_text(json.dumps({**about, "num_steps": trainer.state.global_step}))


def read_rows(settings: dict[str, Any]) -> Dataset:
    lines = Path(settings["data"]).read_text(encoding="utf-8").splitlines()[: settings["max_rows"]]
    return Dataset.from_list([{"query": row["query"], "positive": row["positive"]} for row in map(json.loads, lines)])


def training_arguments(settings: dict[str, Any], out: Path) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(
        output_dir=str(out / "run"),
        num_train_epochs=1,
        per_device_train_batch_size=settings["batch_size"],
        dataloader_drop_last=True,
        learning_rate=settings["lr"],
        weight_decay=settings["weight_decay"],
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_epsilon=settings["eps"],
        max_grad_norm=settings["max_grad_norm"],
        bf16=settings["bf16"],
        use_cpu=settings["device"] == "cpu",
        seed=settings["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_loss(model: SentenceTransformer, settings: dict[str, Any]) -> torch.nn.Module:
    options = {
        "scale": 1.0 / settings["temperature"],
        "directions": tuple(name.replace("document", "doc") for name in settings["directions"]),
        "partition_mode": settings["partition"],
    }
    if settings["cached"]:
        return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=settings["cached"], **options)
    return losses.MultipleNegativesRankingLoss(model, **options)


class _Trainer(SentenceTransformerTrainer):
    """With a schedule that is given step by step: that of the other side."""

    def __init__(self, *, factors: list[float], **kwargs: Any) -> None:
        self._factors = factors
        super().__init__(**kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if len(self._factors) != num_training_steps:
            raise SystemExit(f"The other side has {len(self._factors)} steps, this one {num_training_steps}.")
        last = len(self._factors) - 1
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: self._factors[min(step, last)]
        )
        return self.lr_scheduler


if __name__ == "__main__":
    main()

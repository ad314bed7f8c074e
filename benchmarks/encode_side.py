"""What both sides of `encode.py` share: inputs, and the answers to the parent."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from measure import timed
from torch import Tensor
from workers import open_line


def image_inputs(rows: int, size: int) -> Tensor:
    """Pixels of random images, the same on both sides. *Shape:* ``[rows, 3, size, size]``."""
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))


def id_inputs(rows: int, width: int, vocab_size: int) -> Tensor:
    """Random token ids that end with the last of the vocabulary. *Shape:* ``[rows, width]``."""
    ids = torch.randint(3, vocab_size - 1, (rows, width), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = vocab_size - 1
    return ids


def in_batches(encode: Callable[[Tensor], Tensor], inputs: Tensor, rows: int, device: str) -> Any:
    """Encode batches of ``rows``; return unit embeddings as numpy has them."""
    with torch.inference_mode():
        values = torch.cat([encode(part.to(device)).float() for part in inputs.split(rows)])
        return torch.nn.functional.normalize(values, dim=-1).cpu().numpy()


def serve(steps: Mapping[str, Callable[[], Any]], settings: Mapping[str, Any], name: str) -> None:
    """Answer the parent until it closes the line: run a step, say how long it took, write what it returned."""
    if settings["no_bf16"]:
        steps = {k: step for k, step in steps.items() if "bf16" not in k}
    answer = open_line()
    answer({"name": name, "steps": list(steps)})
    for line in sys.stdin:
        request = json.loads(line)
        seconds, values = timed(torch.device(settings["device"]), steps[request["step"]])
        if request["file"]:
            np.save(request["file"], values)
        answer({"seconds": seconds})

"""What objectives that are made of other objectives share.

Legend: b queries of this rank, m its documents, D embedding size, d size of truncated embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vembed_fs2.embedding.learned import LearnedPart, first_dimensions, merge_parts
from vembed_fs2.losses.common import LossInput, LossOutput, Objective


@dataclass(kw_only=True)
class LossSpec:
    """An objective within the configuration of another one."""

    name: str
    """Its name in ``LOSSES``."""

    config: object = None
    """Its configuration; ``None`` for that with all defaults."""


def nested_errors(spec: LossSpec, path: str) -> list[str]:
    """Return what is wrong with the configuration of a nested objective; keys are named from ``path`` on."""
    return [] if spec.config is None else prefix_keys(spec.config.errors(), f"{path}.config.")  # type: ignore[attr-defined]


def prefix_keys(errors: Sequence[str], path: str) -> list[str]:
    """Put ``path``, which ends with a dot, before the key that each error begins with."""
    return [f"`{path}{e[1:]}" if e.startswith("`") else f"`{path[:-1]}`: {e}" for e in errors]


@dataclass(frozen=True)
class Part:
    """An objective, how much it counts, and how many dimensions of the embeddings it sees."""

    objective: Objective
    weight: float = 1.0
    dim: int | None = None


class Composite(Objective):
    """A weighted sum of objectives. Subclasses say what to do with their metrics."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """:raises ValueError: they declare a learned part differently; a model has one of each."""
        self._parts = parts
        self.learned_parts(max((p.dim for p in parts if p.dim is not None), default=1))

    def learned_parts(self, embedding_dim: int, teacher_dim: int | None = None) -> Sequence[LearnedPart]:
        """:raises ValueError: two of its objectives declare a part differently."""
        declared = (x for p in self._parts for x in p.objective.learned_parts(p.dim or embedding_dim, teacher_dim))

        # The model holds values for all dimensions of its embeddings.
        return merge_parts(
            replace(part, shape=(*part.shape[:-1], embedding_dim)) if part.per_dimension else part for part in declared
        )

    @property
    def uses_labels(self) -> bool:
        return all(p.objective.uses_labels for p in self._parts)

    @property
    def needs_teacher(self) -> bool:
        return any(p.objective.needs_teacher for p in self._parts)

    @property
    def needs_scores(self) -> bool:
        return any(p.objective.needs_scores for p in self._parts)

    @property
    def needs_negatives(self) -> bool:
        return any(p.objective.needs_negatives for p in self._parts)

    def dim_errors(self, embedding_dim: int) -> list[str]:
        errors = []
        for part in self._parts:
            if part.dim is not None and part.dim > embedding_dim:
                errors.append(f"`dims` holds {part.dim}, but embeddings have only {embedding_dim} dimensions.")
            else:
                errors += part.objective.dim_errors(part.dim or embedding_dim)

        return errors

    def compute_parts(self, inputs: LossInput) -> tuple[Tensor, list[LossOutput]]:
        """Return the weighted sum, and the value and the metrics of each part without their graphs.

        Each part is carried backward before the next one begins: at any time
        there is the graph of one, and gradients of this rank's own rows.
        """
        tensors = _tensors_of(inputs)
        needed = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
        outputs: list[LossOutput] = []
        declared = self.learned_parts(inputs.query.size(-1), inputs.teacher_dim)
        total = _SumOfParts.apply(inputs, self._parts, declared, outputs, needed, *tensors)  # type: ignore[no-untyped-call]

        return total, outputs


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: LossInput,
        parts: Sequence[Part],
        declared: Sequence[LearnedPart],
        outputs: list[LossOutput],
        needed: list[bool],
        *tensors: Tensor,
    ) -> Tensor:
        # In single precision at least: the loss scale, which keeps smaller types from underflow, comes only later.
        dtypes = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
        grads = [torch.zeros_like(t, dtype=dtype) if n else None for t, dtype, n in zip(tensors, dtypes, needed)]
        total = torch.zeros((), dtype=dtypes[0], device=tensors[0].device)
        for part in parts:
            seen = inputs if part.dim is None else _truncate(inputs, declared, part.dim)
            leaves = [x.detach().to(t).requires_grad_(n) for x, t, n in zip(_tensors_of(seen), dtypes, needed)]
            query, document, *learned = leaves

            seen = replace(seen, query=query, document=document, parts=dict(zip(seen.parts, learned)))
            with torch.set_grad_enabled(any(needed)):
                output = part.objective.compute(seen)

            outputs.append(LossOutput(output.loss.detach(), output.metrics))
            total += part.weight * output.loss.detach()

            if output.loss.requires_grad:
                _add_gradients(output.loss, part.weight, leaves, grads)

        ctx.grads = grads
        ctx.dtypes = [t.dtype for t in tensors]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("The objective was carried backward twice; its gradients are gone.")

        # In place, because nothing else holds these.
        scaled = (None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(grads, ctx.dtypes))
        return (None, None, None, None, None, *scaled)


def _tensors_of(inputs: LossInput) -> list[Tensor]:
    """What an objective may have gradients for."""
    return [inputs.query, inputs.document, *inputs.parts.values()]


def _truncate(inputs: LossInput, declared: Sequence[LearnedPart], dim: int) -> LossInput:
    """The same with the first ``dim`` dimensions of each embedding."""
    parts = first_dimensions(inputs.parts, declared, dim)
    return replace(inputs, query=inputs.query[..., :dim], document=inputs.document[..., :dim], parts=parts)


def _add_gradients(loss: Tensor, weight: float, leaves: Sequence[Tensor], totals: Sequence[Tensor | None]) -> None:
    """Carry a loss backward; add to the gradients of tensors of which the leaves are the first dimensions."""
    trained = [(leaf, total) for leaf, total in zip(leaves, totals) if total is not None]
    grads = torch.autograd.grad(loss, [leaf for leaf, _ in trained], torch.full_like(loss, weight), allow_unused=True)
    for (_, total), grad in zip(trained, grads):
        if grad is not None:
            total[..., : grad.size(-1)] += grad

"""No checkpoint of a training that has diverged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from fairseq2.metrics import MetricBag
from fairseq2.metrics.aggregation import Mean, Sum
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from vembed_fs2.distributed import all_max
from vembed_fs2.errors import VembedError
from vembed_fs2.fairseq2_seams import call_before, complete_checkpoint
from vembed_fs2.recipes.processes import RESUME

if TYPE_CHECKING:
    from fairseq2.trainer import Trainer

_VALUES: Final = ("finite", "-inf", "inf", "nan")


class FiniteGuard:
    """Ends a training whose loss, gradient, weights or optimizer are not finite, before that state is saved.

    All ranks end at the same point, whichever has such a number, and a checkpoint
    that is being written is completed first.

    :param model: the model as it is trained: DDP's or FSDP2's, if there is one.
    """

    bag: MetricBag
    """The trainer's sums since its last report. It gives them to the unit before it is complete itself."""

    def __init__(self, model: Module) -> None:
        self._model = model
        self._first = 0
        """The first parameter that was not finite when a loss was not, as :meth:`_find` counts; 0 if none was."""

    def install(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Check before each checkpoint and each report from now on."""
        self._trainer, self._optimizer = trainer, optimizer
        call_before(trainer, save=partial(self.check, with_state=True), publish=partial(self.check, with_state=False))

    def see(self, loss: Tensor) -> None:
        """Remember where the first number that is not finite was: a step later, it may be everywhere.

        On a GPU nothing is done, because asking would wait for it.
        """
        if self._first == 0 and loss.device.type == "cpu" and not loss.isfinite():
            self._first = self._find(self._weights())

    def check(self, *, with_state: bool) -> None:
        """Called by all ranks at the same time.

        :param with_state: whether to look at all weights and at the optimizer, and not only at what the steps
            since the last report have recorded.
        :raises VembedError: a number of any rank is not finite.
        """
        loss: Any = self.bag.get("loss", Sum)
        grad_norm: Any = self.bag.get("grad_norm", Mean)
        codes = [_code(float(metric.weighted_sum)) for metric in (loss, grad_norm)]
        codes += [self._find(self._weights()), self._find(self._averages())] if with_state else [0, 0]

        loss_code, grad_code, weight, average, first = all_max([*codes, self._first], None)
        if not (loss_code or grad_code or weight or average):
            self._first = 0  # A step that was skipped for its loss scale.
            return

        # Its content is finite.
        complete_checkpoint(self._trainer)

        if not with_state:
            (weight,) = all_max([self._find(self._weights())], None)

        if loss_code or grad_code:
            what = f"The loss is {_VALUES[loss_code]}" if loss_code else f"The gradient is {_VALUES[grad_code]}"
        else:
            what = "The weights are not finite" if weight else "The optimizer's state is not finite"

        raise VembedError(
            f"{what}: the training has diverged. {self._where(first or weight, average)}Lower `optimizer.config.lr`, "
            "set `trainer.max_grad_norm`, or look for numbers that are not finite in the model's weights. "
            f"This state is not saved. {RESUME}"
        )

    def _where(self, weight: int, average: int) -> str:
        names = [name for name, _ in self._model.named_parameters()]
        if weight:
            return f"`{_plain(names[-weight])}` is the first parameter that is not finite. "
        if average:
            return f"The optimizer's averages of `{_plain(names[-average])}` are the first that are not finite. "
        return "The weights are finite. "

    def _find(self, tensors: Iterator[tuple[int, Tensor]]) -> int:
        """Return the place, counted from the end so that the first is the largest, of a tensor that is not finite.

        :param tensors: places in the model's parameters, in order, and this rank's part of a tensor.
        :returns: 0 if all are finite.
        """
        places, extremes = [], []
        for place, tensor in tensors:
            if tensor.numel() > 0 and tensor.is_floating_point():
                places.append(place)
                extremes.append(
                    torch.stack(torch.aminmax(tensor)).float()
                )  # In one pass; each is NaN if any number is.

        if not places:
            return 0

        finite = torch.stack(extremes).isfinite().all(1).tolist()
        return max((place for place, is_finite in zip(places, finite) if not is_finite), default=0)

    @torch.no_grad()
    def _weights(self) -> Iterator[tuple[int, Tensor]]:
        parameters = list(self._model.parameters())
        for idx, parameter in enumerate(parameters):
            yield len(parameters) - idx, _local(parameter.detach())

    def _averages(self) -> Iterator[tuple[int, Tensor]]:
        parameters = list(self._model.parameters())
        state = self._optimizer.state
        for idx, parameter in enumerate(parameters):
            for value in state[parameter].values() if parameter in state else ():
                if isinstance(value, Tensor):
                    yield len(parameters) - idx, _local(value)


def _code(value: float) -> int:
    if math.isfinite(value):
        return 0
    return 3 if math.isnan(value) else 1 + (value > 0)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _plain(name: str) -> str:
    """The model's own name of a parameter: DDP and activation checkpointing add to it."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")

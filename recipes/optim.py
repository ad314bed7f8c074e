"""The optimizer and the learning rate schedule of the recipes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal, final

from fairseq2.optim.lr_schedulers import AbstractLRScheduler, LRScheduler
from fairseq2.recipe.component import register_component
from fairseq2.recipe.config import AdamWGroupConfig, RegimeSection, default
from fairseq2.runtime.dependency import DependencyContainer, DependencyResolver
from fairseq2.utils.validation import ValidationResult
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from vembed_fs2.errors import ConfigError

ADAMW: Final = "vembed_adamw"

WARMUP_DECAY: Final = "warmup_decay"


@dataclass(kw_only=True)
class EmbeddingAdamWConfig:
    """AdamW that decays matrices only: no norm, bias, temperature or other vector (Loshchilov and Hutter, 2019)."""

    lr: float = 2e-5
    """The learning rate."""

    betas: tuple[float, float] = (0.9, 0.999)
    """The coefficients of the running averages of the gradient and its square."""

    eps: float = 1e-8
    """Added to the denominator."""

    weight_decay: float = 0.01
    """The decay of matrices."""

    groups: Sequence[AdamWGroupConfig] = field(default_factory=list)
    """Parameters that have values of their own, by regular expressions that the beginnings of their names match."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        for error in _value_errors(self, ""):
            result.add_error(error)

        for idx, group in enumerate(self.groups):
            for error in _value_errors(group, f"groups[{idx}]."):
                result.add_error(error)

            for pattern in _patterns(group):
                try:
                    re.compile(pattern)
                except re.error as ex:
                    result.add_error(f"`groups[{idx}].params`: '{pattern}' is not a valid regular expression: {ex}.")

        return result


def _value_errors(config: EmbeddingAdamWConfig | AdamWGroupConfig, path: str) -> Iterator[str]:
    """Return what is wrong with the numbers of an optimizer, or of a group that may leave some to it."""
    for name in ("lr", "eps", "weight_decay"):
        value = getattr(config, name)
        if value != default and not (0.0 <= value < math.inf and (value > 0.0 or name != "lr")):
            rule = "greater than 0" if name == "lr" else "at least 0"
            yield f"`{path}{name}` must be {rule} and finite, but is {value} instead."

    if config.betas != default and not all(0.0 <= beta < 1.0 for beta in config.betas):
        yield f"`{path}betas` must be at least 0 and less than 1, but are {config.betas} instead."


@dataclass(kw_only=True)
class WarmupDecayConfig:
    """Linear warmup, then a decay to the end of the training."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup."""

    warmup_steps: int | None = None
    """The number of warmup steps; overrides ``warmup_ratio``."""

    warmup_ratio: float = 0.1
    """The fraction of all steps that is warmup."""

    final_lr_scale: float = 0.0
    """What the learning rate falls to, as a fraction of its highest value."""

    def validate(self) -> ValidationResult:
        result = ValidationResult()
        if self.warmup_steps is not None and self.warmup_steps < 0:
            result.add_error(f"`warmup_steps` must not be negative, but is {self.warmup_steps} instead.")

        for name in ("warmup_ratio", "final_lr_scale"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                result.add_error(f"`{name}` must be between 0 and 1, but is {value} instead.")

        return result


def register_optim(container: DependencyContainer) -> None:
    """Register the optimizer and the schedule with fairseq2."""
    register_component(container, Optimizer, ADAMW, EmbeddingAdamWConfig, _create_adamw)
    register_component(container, LRScheduler, WARMUP_DECAY, WarmupDecayConfig, _create_warmup_decay)


def _create_adamw(resolver: DependencyResolver, config: EmbeddingAdamWConfig) -> Optimizer:
    groups = split_decay(resolver.resolve(Module), config)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


def split_decay(model: Module, config: EmbeddingAdamWConfig) -> list[dict[str, Any]]:
    """Split each group of trained parameters into those with and those without weight decay.

    :raises ConfigError: lists the groups of the configuration that no trained parameter belongs to.
    """
    groups: list[dict[str, Any]] = []
    for group in _group_parameters(model, config.groups):
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]

        if matrices:
            groups.append({**group, "params": matrices})
        if vectors:
            groups.append({**group, "params": vectors, "weight_decay": 0.0})

    return groups


def _group_parameters(model: Module, configs: Sequence[AdamWGroupConfig]) -> list[dict[str, Any]]:
    """Put each trained parameter into the first group that it matches, or into one without values of its own.

    Unlike fairseq2's ``prepare_parameter_groups``, by the model's own names: DDP
    and activation checkpointing add to them.
    """
    groups: list[dict[str, Any]] = [{"params": [], **_own_values(config)} for config in configs]
    rest: dict[str, Any] = {"params": []}
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    for full_name, parameter in inner.named_parameters():
        if parameter.requires_grad:
            name = full_name.replace("_checkpoint_wrapped_module.", "")
            fitting = (group for group, config in zip(groups, configs) if _matches(config, name))
            next(fitting, rest)["params"].append(parameter)

    errors = [
        f"`groups[{idx}].params` {config.params!r} matches no parameter that is trained and in no earlier group."
        for idx, config in enumerate(configs)
        if not groups[idx]["params"]
    ]
    if errors:
        raise ConfigError(errors, where="`optimizer.config`")

    return [*groups, rest]


def _own_values(config: AdamWGroupConfig) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "params"}
    return {name: value for name, value in values.items() if value != default}


def _matches(config: AdamWGroupConfig, name: str) -> bool:
    return any(re.match(pattern, name) for pattern in _patterns(config))


def _patterns(config: AdamWGroupConfig) -> Sequence[str]:
    return [config.params] if isinstance(config.params, str) else config.params


def _create_warmup_decay(resolver: DependencyResolver, config: WarmupDecayConfig) -> LRScheduler:
    num_steps = resolver.resolve(RegimeSection).num_steps
    assert num_steps is not None
    return WarmupDecay(resolver.resolve(Optimizer), schedule(config, num_steps))


@final
class WarmupDecay(AbstractLRScheduler):
    """Multiplies the learning rate of each group by ``factor(step)``."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self._factor = factor
        super().__init__(optimizer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict().items() if k != "_factor"}

    @override
    def _compute_lrs(self) -> list[float | Tensor]:
        return [lr * self._factor(self.last_epoch) for lr in self.base_lrs]


def schedule(config: WarmupDecayConfig, num_steps: int) -> Callable[[int], float]:
    """Return the fraction of the learning rate at each step, counted from 0."""
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * num_steps)
    low = config.final_lr_scale

    def factor(step: int) -> float:
        if step < warmup:
            # The first step is not wasted on a learning rate of zero.
            return (step + 1) / (warmup + 1)

        progress = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
        if config.decay == "cosine":
            return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))

        return 1.0 - (1.0 - low) * progress if config.decay == "linear" else 1.0

    return factor

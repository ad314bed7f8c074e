"""Finds out what a model does with a small input, whatever its class.

Shapes: N texts or images, S states, M model size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad

from vembed_fs2.embedding.head import HeadConfig
from vembed_fs2.models.auto.backbone import Backbone, unfit
from vembed_fs2.models.auto.run import Outputs, run_image, run_text

_LENGTH: Final = 8
"""The tokens of the text."""

_PADDING: Final = 3
"""The padding after it that must not change what the model makes of it."""

_CLASS_TOKENS: Final = ("cls_token", "class_embedding", "class_token")

_OTHER_PREFIX_TOKENS: Final = ("distillation_token", "register_tokens", "storage_tokens")


@dataclass(frozen=True)
class Trace:
    """What a model did."""

    outputs: Outputs

    parameters: dict[int, str]
    """The names of the model's parameters, by the identity of their tensors."""

    calls: Counter[str]
    """How often each module was called, by its name."""

    num_prefix_tokens: int
    """The number of an image's states before its patches' states."""

    @property
    def has_class_token(self) -> bool:
        """Whether the first state of an image belongs to a class token."""
        names = self.parameters.values()
        return not self.outputs.is_map and any(name.rpartition(".")[2] in _CLASS_TOKENS for name in names)

    def used_parameters(self, head: HeadConfig) -> frozenset[str]:
        """The parameters that embeddings depend on, through the states, the model's own pooler, or both."""
        outputs = (
            self.outputs.states if head.reads_states else None,
            self.outputs.pooled if head.reads_pooler else None,
        )

        seen, waiting = set(), [output.grad_fn for output in outputs if output is not None]
        while waiting:
            function = waiting.pop()
            if function is not None and function not in seen:
                seen.add(function)
                waiting += [f for f, _ in function.next_functions]

        variables = (getattr(function, "variable", None) for function in seen)
        return frozenset(self.parameters[id(v)] for v in variables if id(v) in self.parameters)


def trace_text(backbone: Backbone, wrapped: Module) -> Trace:
    """Run the model on a short text, and check that padding does not change what it makes of it.

    :raises ModelLoadError: it fails on texts, or an embedding would depend on the other texts of a batch.
    """
    ids, pad_id = _probe_ids(backbone)
    with _failing(backbone):
        trace = _trace(wrapped, lambda: run_text(wrapped, backbone, ids, None, None))
        other = torch.cat([ids[:, :_PADDING], ids], dim=1)

        both = torch.cat([pad(ids, (0, _PADDING), value=pad_id), other])
        mask = torch.ones_like(both)
        mask[0, -_PADDING:] = 0
        with torch.no_grad():
            padded = run_text(wrapped, backbone, both, mask, None)

    states = trace.outputs.states
    if states is not None and states.size(1) != ids.size(1):
        raise unfit(backbone.kls, f"it has {states.size(1)} states for {ids.size(1)} tokens")
    if not (_is_first(states, padded.states) and _is_first(trace.outputs.pooled, padded.pooled)):
        raise unfit(backbone.kls, "what it makes of a text depends on the padding after it")

    return trace


def _is_first(alone: Tensor | None, batch: Tensor | None) -> bool:
    """Whether the first row of a batch is what the model makes of it alone."""
    if alone is None or batch is None:
        return True
    first = batch[:1, : alone.size(1)] if batch.ndim == 3 else batch[:1]
    return torch.allclose(alone, first, rtol=0.0, atol=1e-3 * float(alone.detach().abs().max()))


def _probe_ids(backbone: Backbone) -> tuple[Tensor, int]:
    """A short text, and the id of the padding. *Shape:* ``[1, L]``."""
    config = backbone.text_config
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
    special = {name: getattr(config, name, None) for name in names}
    size = int(getattr(config, "vocab_size", 32))
    plain = [i for i in range(min(size, 1000)) if i not in special.values()] or [0]
    length = min(_LENGTH, (backbone.max_text_length or _LENGTH + _PADDING) - _PADDING)

    ids = [plain[(7 * i + 5) % len(plain)] for i in range(length)]
    end, padding = special["eos_token_id"], special["pad_token_id"]
    if isinstance(end, int) and 0 <= end < size:
        ids[-1] = end  # Some pool the state of this token.

    return torch.tensor([ids]), padding if isinstance(padding, int) and 0 <= padding < size else 0


def trace_image(backbone: Backbone, wrapped: Module | None = None) -> Trace:
    """Run the model on an image, without computing anything where that is possible.

    :param wrapped: the model with its weights, if there is one.
    :raises ModelLoadError: it fails on images.
    """
    shape = (1, backbone.num_channels, *backbone.image_size)
    try:
        empty = backbone.create_empty().eval()
        return _trace(empty, lambda: run_image(empty, backbone, torch.zeros(shape, device="meta")))
    except Exception:  # What the model does depends on values, which are not there.
        model = wrapped or backbone.create().eval()

    with _failing(backbone):
        return _trace(model, lambda: run_image(model, backbone, torch.zeros(shape)))


def _trace(model: Module, run: Callable[[], Outputs]) -> Trace:
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    handles = [module.register_forward_pre_hook(count(name)) for name, module in model.named_modules()]
    try:
        with torch.enable_grad():  # type: ignore[no-untyped-call]
            outputs = run()
    finally:
        for handle in handles:
            handle.remove()

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Trace(outputs, names, calls, 0 if outputs.is_map else _count_prefix_tokens(model))


def _count_prefix_tokens(model: Module) -> int:
    count = 0
    for name, parameter in model.named_parameters():
        kind = name.rpartition(".")[2]
        if kind in _CLASS_TOKENS:
            count += 1
        elif kind in _OTHER_PREFIX_TOKENS:
            count += parameter.size(-2)

    return count


@contextmanager
def _failing(backbone: Backbone) -> Iterator[None]:
    """Say of an error of the model's that it cannot be wrapped."""
    try:
        yield
    except Exception as ex:
        raise unfit(backbone.kls, f"{type(ex).__name__}: {ex}") from ex

"""Gradient cache by decorators, for loops that already have an encode call and a loss call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Protocol

from torch import Tensor

from vembed_fs2.gradcache.engine import GradCache


@dataclass(frozen=True)
class CachedRows:
    """Rows that are encoded when a loss asks for them."""

    encode: Callable[[Any], Any]
    """Takes a chunk of the rows."""

    rows: Any

    key: tuple[object, ...]
    """Equal for rows that share an encoder."""


class CachedLoss(Protocol):
    """A loss whose arguments may be rows of a cached encode call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


def cached(encode: Callable[..., Any]) -> Callable[..., CachedRows]:
    """Make a call of an encoder wait until a :func:`cached_loss` asks for its embeddings.

    .. code:: python

        @cached
        def encode(model, batch):
            return model(**batch).pooler_output


        @cached_loss(chunk_tokens=2048)
        def contrast(queries, documents): ...


        contrast(encode(model, queries), encode(model, documents)).backward()

    :param encode: its last positional argument is the batch: an
        ``EncoderBatch`` or a dict of tensors. It returns what ``encode`` of
        :class:`GradCache` returns.
    """

    @wraps(encode)
    def defer(*args: Any, **kwargs: Any) -> CachedRows:
        if not args:
            raise TypeError(f"`{encode.__name__}` needs the batch as its last positional argument.")

        *first, rows = args
        key = (encode, *map(id, first), *((name, id(value)) for name, value in sorted(kwargs.items())))
        return CachedRows(partial(encode, *first, **kwargs), rows, key)

    return defer


def cached_loss(**options: Any) -> Callable[[Callable[..., Tensor]], CachedLoss]:
    """Make a loss take the rows of :func:`cached` calls in place of embeddings, and run the gradient-cache step.

    Other arguments are passed on. The step's statistics are in the loss's
    attribute ``stats``.

    :param options: the options of :class:`GradCache`.
    :raises TypeError: none of the arguments is a call of a cached encoder.
    """

    def decorate(loss: Callable[..., Tensor]) -> CachedLoss:
        step = GradCache([], loss, **options)

        @wraps(loss)
        def run(*args: Any, **kwargs: Any) -> Tensor:
            roles = [a for a in args if isinstance(a, CachedRows)]
            if not roles:
                raise TypeError(f"`{loss.__name__}` needs the result of a cached encode call.")
            if any(isinstance(v, CachedRows) for v in kwargs.values()):
                raise TypeError(f"`{loss.__name__}` takes the results of cached encode calls by position only.")

            # One encoder for all roles that share it, so that their rows share chunks.
            encoders: dict[tuple[object, ...], Callable[[Any], Any]] = {}
            encode = [encoders.setdefault(role.key, role.encode) for role in roles]
            step.rebind(encode, _fill(loss, args))
            value = step(*(role.rows for role in roles), **kwargs)
            run.stats = step.stats  # type: ignore[attr-defined]

            return value

        return run

    return decorate


def _fill(loss: Callable[..., Tensor], args: tuple[Any, ...]) -> Callable[..., Tensor]:
    """A function of the embeddings alone."""

    def compute(*embeddings: Any, **kwargs: Any) -> Tensor:
        values = iter(embeddings)
        return loss(*(next(values) if isinstance(a, CachedRows) else a for a in args), **kwargs)

    return compute

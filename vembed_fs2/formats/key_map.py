"""How the tensors of a checkpoint are named, split and shaped there and here; read both ways, one tensor at a time.

In the names of rules ``*`` stands for the number of a layer, and a name that
ends in ``.`` for all names that begin with it::

    KeyMap(
        Rename("embeddings.word.", "frontend.embed."),
        Split("layers.*.attn.Wqkv.", ("layers.*.q_proj.", "layers.*.k_proj.", "layers.*.v_proj.")),
        Reshape("cls_token", "frontend.class_embed", leading_dims(2)),
        Drop(r"classifier\\..*"),
    )

The first rule that fits a name decides; a name that fits none stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from vembed_fs2.errors import ModelLoadError

_NUMBER: Final = "*"

_PARAMETER: Final = re.compile(r"\.(weight|bias)$")
"""The endings of tensor names that follow the name of a module."""


class Shape(NamedTuple):
    """Another shape of the same values."""

    to_ours: Callable[[Tensor], Tensor]

    to_theirs: Callable[[Tensor], Tensor]


def leading_dims(count: int) -> Shape:
    """Return the shape of a tensor that has ``count`` dimensions of size 1 there that it does not have here."""

    def drop(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[count:]) if tensor.shape[:count] == (1,) * count else tensor

    return Shape(drop, lambda tensor: tensor.reshape((1,) * count + tuple(tensor.shape)))


SCALAR: Final = Shape(lambda tensor: tensor.reshape(1), lambda tensor: tensor.reshape(()))
"""A scalar there, and one dimension here: FSDP2 refuses scalar parameters."""

TRANSPOSED: Final = Shape(lambda tensor: tensor.T, lambda tensor: tensor.T.contiguous())
"""A matrix that is multiplied from the other side."""


@final
@dataclass(frozen=True)
class Rename:
    """One tensor there, one here."""

    theirs: str
    ours: str


@final
@dataclass(frozen=True)
class Reshape:
    """One tensor there, one here, of another shape."""

    theirs: str
    ours: str
    shape: Shape


@final
@dataclass(frozen=True)
class Split:
    """One tensor there, several here."""

    theirs: str
    ours: Sequence[str]
    dim: int = 0
    sizes: Sequence[int] | None = None
    """The sizes of the parts; ``None`` if they are equal."""


@final
@dataclass(frozen=True)
class Join:
    """Several tensors there, one here."""

    theirs: Sequence[str]
    ours: str
    dim: int = 0
    sizes: Sequence[int] | None = None
    """The sizes of the parts; ``None`` if they are equal."""


@final
@dataclass(frozen=True)
class Drop:
    """Tensors that are not read, or not written."""

    theirs: str = ""
    """A regular expression for whole names there."""

    ours: str = ""
    """A regular expression for whole names here."""


@final
@dataclass(frozen=True)
class Tie:
    """A tensor there that repeats another one of theirs: it is not read, and written if that one is."""

    theirs: str
    source: str


Rule: TypeAlias = Rename | Reshape | Split | Join | Drop | Tie


@final
class KeyMap:
    """The rules of a format."""

    def __init__(self, *rules: Rule, prefixes: Sequence[str] = (), old_names: Mapping[str, str] | None = None) -> None:
        """
        :param prefixes: what names may begin with in models with a head on top. It is removed before the rules are
            looked at, and never written.
        :param old_names: regular expressions for parts of names that older versions wrote, and what replaces them.
        """
        self.rules = rules
        self.prefixes = tuple(prefixes)
        self.old_names = dict(old_names or {})

    def read(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Convert tensors to our names.

        :param tensors: by their names; each is asked for when it is needed, and not kept.
        :raises ModelLoadError: a tensor is missing that another one belongs to.
        """
        names = {self._plain(name): name for name in tensors}
        yield from _convert(names, tensors, self._readers, self._not_read)

    def write(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Convert tensors to their names, the reverse of :meth:`read`."""
        written = _convert({name: name for name in tensors}, tensors, self._writers, self._not_written)
        ties = [rule for rule in self.rules if isinstance(rule, Tie)]
        for name, tensor in written:
            yield name, tensor
            for tie in ties:
                if tie.source == name:
                    yield tie.theirs, tensor

    def modules(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return which of our modules each original module is: several, if its tensors are split.

        :param names: the names of our tensors or modules.
        :returns: our modules by the original's name, in the order of ``names``.
        """
        found: dict[str, dict[str, None]] = {}
        for module in dict.fromkeys(_module_of(name) for name in names):
            if self._is_tensor(module):
                continue

            # A rule of a module ends in a dot; one of a tensor has its name.
            for name in (f"{module}.weight", f"{module}.bias"):
                for theirs in self._originals(name):
                    # Others are parameters of a module that has several.
                    if _PARAMETER.search(theirs):
                        found.setdefault(_module_of(theirs), {}).setdefault(module)

        return {theirs: tuple(ours) for theirs, ours in found.items()}

    def _is_tensor(self, name: str) -> bool:
        """Whether a name without ``.weight`` or ``.bias`` names a parameter itself."""
        found = (source.match(name) for move in self._writers for source in move.sources)
        return self._not_written.fullmatch(name) is not None or any(
            rest is not None and not rest.rest for rest in found
        )

    def _originals(self, name: str) -> Sequence[str]:
        if self._not_written.fullmatch(name):
            return []

        for move in self._writers:
            for source in move.sources:
                if (rest := source.match(name)) is not None:
                    return [target.fill(rest) for target in move.targets]

        return [name]

    def _plain(self, name: str) -> str:
        name = next((name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix)), name)
        for pattern, new in self.old_names.items():
            name = re.sub(pattern, new, name)
        return name

    @cached_property
    def _readers(self) -> Sequence[_Move]:
        return [_reader(rule) for rule in self.rules if not isinstance(rule, (Drop, Tie))]

    @cached_property
    def _writers(self) -> Sequence[_Move]:
        return [_writer(rule) for rule in self.rules if not isinstance(rule, (Drop, Tie))]

    @cached_property
    def _not_read(self) -> re.Pattern[str]:
        patterns = [rule.theirs for rule in self.rules if isinstance(rule, Drop) and rule.theirs]
        return _any_of(patterns + [re.escape(rule.theirs) for rule in self.rules if isinstance(rule, Tie)])

    @cached_property
    def _not_written(self) -> re.Pattern[str]:
        return _any_of([rule.ours for rule in self.rules if isinstance(rule, Drop) and rule.ours])


class _Match(NamedTuple):
    """What a name has where its rule says nothing."""

    numbers: tuple[str, ...]
    rest: str


class _Name:
    """The name of a tensor or module in a rule."""

    def __init__(self, name: str) -> None:
        self._parts = name.split(_NUMBER)
        pattern = "([0-9]+)".join(re.escape(part) for part in self._parts)
        # What follows a whole module; a tensor's name ends here.
        self._regex = re.compile(pattern + ("(.*)" if name.endswith(".") or name == "" else "()"), re.DOTALL)

    def match(self, name: str) -> _Match | None:
        found = self._regex.fullmatch(name)
        return None if found is None else _Match(found.groups()[:-1], found.groups()[-1])

    def fill(self, match: _Match) -> str:
        parts = [self._parts[0]]
        for number, part in zip(match.numbers, self._parts[1:], strict=True):
            parts += [number, part]
        return "".join(parts) + match.rest


class _Move(NamedTuple):
    """A rule, read in one direction."""

    sources: Sequence[_Name]
    targets: Sequence[_Name]
    convert: Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _reader(rule: Rename | Reshape | Split | Join) -> _Move:
    match rule:
        case Rename(theirs, ours):
            return _Move([_Name(theirs)], [_Name(ours)], _as_is)
        case Reshape(theirs, ours, shape):
            return _Move([_Name(theirs)], [_Name(ours)], lambda tensors: [shape.to_ours(tensors[0])])
        case Split(theirs, parts):
            return _Move([_Name(theirs)], [_Name(part) for part in parts], _splitter(rule, len(parts)))
        case Join(parts, ours):
            return _Move([_Name(part) for part in parts], [_Name(ours)], _joiner(rule.dim))


def _writer(rule: Rename | Reshape | Split | Join) -> _Move:
    match rule:
        case Rename(theirs, ours):
            return _Move([_Name(ours)], [_Name(theirs)], _as_is)
        case Reshape(theirs, ours, shape):
            return _Move([_Name(ours)], [_Name(theirs)], lambda tensors: [shape.to_theirs(tensors[0])])
        case Split(theirs, parts):
            return _Move([_Name(part) for part in parts], [_Name(theirs)], _joiner(rule.dim))
        case Join(parts, ours):
            return _Move([_Name(ours)], [_Name(part) for part in parts], _splitter(rule, len(parts)))


def _as_is(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


def _splitter(rule: Split | Join, count: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    def split(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        tensor = tensors[0]
        if rule.sizes is not None:
            return torch.split(tensor, list(rule.sizes), rule.dim)
        return tensor.chunk(count, rule.dim)

    return split


def _joiner(dim: int) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    return lambda tensors: tensors if len(tensors) == 1 else [torch.cat(list(tensors), dim)]


def _any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")


def _module_of(name: str) -> str:
    return _PARAMETER.sub("", name)


def _convert(
    names: Mapping[str, str], tensors: Mapping[str, Tensor], moves: Sequence[_Move], dropped: re.Pattern[str]
) -> Iterator[tuple[str, Tensor]]:
    """Convert tensors.

    :param names: what ``tensors`` calls each tensor.
    """
    for name in names:
        if dropped.fullmatch(name):
            continue

        for move in moves:
            position, rest = next(((i, m) for i, s in enumerate(move.sources) if (m := s.match(name))), (0, None))
            if rest is None:
                continue

            # The others come along with the first; if that is missing, this one says so.
            if position == 0 or move.sources[0].fill(rest) not in names:
                yield from _apply(move, rest, name, names, tensors)

            break
        else:
            yield name, tensors[names[name]]


def _apply(
    move: _Move, rest: _Match, name: str, names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    sources = [source.fill(rest) for source in move.sources]
    if missing := [source for source in sources if source not in names]:
        raise ModelLoadError(f"The checkpoint has `{name}`, but lacks `{missing[0]}`.")

    converted = move.convert([tensors[names[source]] for source in sources])
    for target, tensor in zip(move.targets, converted, strict=True):
        yield target.fill(rest), tensor

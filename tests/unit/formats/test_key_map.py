from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.key_map import (
    SCALAR,
    TRANSPOSED,
    Drop,
    Join,
    KeyMap,
    Rename,
    Reshape,
    Rule,
    Split,
    Tie,
    leading_dims,
)

LAYERS = 2


@st.composite
def key_maps(draw: st.DrawFn) -> tuple[KeyMap, dict[str, Tensor], set[str]]:
    """Rules of every kind in any order, tensors that they are for, and what is not read."""
    rules: list[Rule] = []
    tensors: dict[str, Tensor] = {}
    dropped: set[str] = set()
    kinds = draw(st.lists(st.sampled_from(["rename", "reshape", "split", "join", "drop", "tie"]), max_size=8))
    for number, kind in enumerate(kinds):
        theirs, ours = f"layers.*.their{number}", f"stack.*.our{number}"
        size, dim, count = draw(st.integers(1, 4)), draw(st.integers(0, 1)), draw(st.integers(2, 3))
        parts = [f"{{}}.part{i}." for i in range(count)]
        sizes = draw(st.none() | st.lists(st.integers(1, 4), min_size=count, max_size=count))
        lengths = sizes or [size] * count
        shapes: dict[str, tuple[int, ...]] = {}
        match kind:
            case "rename":
                rules.append(Rename(f"{theirs}.", f"{ours}."))
                shapes = {f"{theirs}.weight": (size, 2), f"{theirs}.bias": (size,)}
            case "reshape":
                shape, their_shape = draw(
                    st.sampled_from(
                        [(leading_dims(2), (1, 1, size)), (SCALAR, ()), (TRANSPOSED, (size, 3))]  # type: ignore[list-item]
                    )
                )
                rules.append(Reshape(theirs, ours, shape))
                shapes = {theirs: their_shape}
            case "split":
                rules.append(Split(f"{theirs}.", [p.format(ours) for p in parts], dim, sizes))
                whole = (sum(lengths), 2) if dim == 0 else (2, sum(lengths))
                shapes = {f"{theirs}.weight": whole}
            case "join":
                rules.append(Join([p.format(theirs) for p in parts], f"{ours}.", dim, sizes))
                shapes = {
                    f"{p.format(theirs)}weight": (length, 2) if dim == 0 else (2, length)
                    for p, length in zip(parts, lengths)
                }
            case "drop":
                rules.append(Drop(theirs=rf"layers\.[0-9]+\.their{number}\..*"))
                shapes = {f"{theirs}.weight": (size,)}
            case _:
                rules += [Rename(f"source{number}", f"ours{number}"), Tie(f"copy{number}", f"source{number}")]
                tensors[f"source{number}"] = torch.randn(size)
                tensors[f"copy{number}"] = tensors[f"source{number}"]
        for name, shape_ in shapes.items():
            for layer in range(LAYERS):
                tensors[name.replace("*", str(layer))] = torch.randn(shape_)
                if kind == "drop":
                    dropped.add(name.replace("*", str(layer)))
    tensors["unknown.weight"] = torch.randn(1)
    names = draw(st.permutations(list(tensors)))
    return KeyMap(*draw(st.permutations(rules)), prefixes=["model."]), {n: tensors[n] for n in names}, dropped


@given(key_maps(), st.booleans())
def test_any_rules_round_trip(example: tuple[KeyMap, dict[str, Tensor], set[str]], has_prefix: bool) -> None:
    key_map, tensors, dropped = example
    theirs = {f"model.{name}" if has_prefix else name: tensor for name, tensor in tensors.items()}
    back = dict(key_map.write(dict(key_map.read(theirs))))
    assert back.keys() == tensors.keys() - dropped
    for name, tensor in back.items():
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor, tensors[name]), name


class Lazy(Mapping[str, Tensor]):
    """Makes tensors when they are asked for, and remembers which."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.made: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.made.append(name)
        return torch.ones(6)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_tensors_are_asked_for_one_at_a_time_and_dropped_ones_never() -> None:
    rules = [Drop(theirs="head"), Split("fused", ["q", "k", "v"]), Join(["up", "gate"], "both")]
    lazy = Lazy(["first", "gate", "head", "fused", "up", "last"])
    read = KeyMap(*rules).read(lazy)
    seen = []
    for name, _ in read:
        seen.append((name, list(lazy.made)))
    assert seen == [
        ("first", ["first"]),
        ("q", ["first", "fused"]),
        ("k", ["first", "fused"]),
        ("v", ["first", "fused"]),
        ("both", ["first", "fused", "up", "gate"]),
        ("last", ["first", "fused", "up", "gate", "last"]),
    ]


@pytest.mark.parametrize("kept", ["up", "gate"])
def test_a_missing_part_is_named(kept: str) -> None:
    lacking = "gate" if kept == "up" else "up"
    with pytest.raises(ModelLoadError, match=f"has `{kept}`, but lacks `{lacking}`"):
        dict(KeyMap(Join(["up", "gate"], "both")).read({kept: torch.ones(1)}))


def test_old_names_and_names_that_only_begin_alike() -> None:
    key_map = KeyMap(Rename("norm.", "layer_norm."), Rename("x.*", "y.*"), old_names={r"\.gamma$": ".weight"})
    tensor = torch.ones(1)
    theirs = {"norm.gamma": tensor, "norm_2.weight": tensor, "x.1": tensor, "x.1.weight": tensor, "x.a": tensor}
    assert list(dict(key_map.read(theirs))) == ["layer_norm.weight", "norm_2.weight", "y.1", "x.1.weight", "x.a"]


def test_modules_of_the_original_model() -> None:
    key_map = KeyMap(
        Drop(ours="logit_scale"),
        Rename("layer.*.out.", "layers.*.output_proj."),
        Split("layer.*.Wqkv.", [f"layers.*.{n}_proj." for n in "qkv"]),
        *(Split(f"in_proj_{kind}", [f"pool.{n}.{kind}" for n in "qkv"]) for kind in ("weight", "bias")),
        Join(["up.", "gate."], "both."),
        Reshape("cls_token", "class_embed", leading_dims(2)),
    )
    names = [f"layers.{i}.{n}_proj.weight" for i in range(2) for n in ("q", "k", "v", "output")]
    expected: Any = {
        "layer.0.Wqkv": ("layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"),
        "layer.0.out": ("layers.0.output_proj",),
        "layer.1.Wqkv": ("layers.1.q_proj", "layers.1.k_proj", "layers.1.v_proj"),
        "layer.1.out": ("layers.1.output_proj",),
        "up": ("both",),
        "gate": ("both",),
        "other": ("other",),
    }
    assert key_map.modules([*names, "both.weight", "pool.q.weight", "logit_scale", "class_embed", "other"]) == expected

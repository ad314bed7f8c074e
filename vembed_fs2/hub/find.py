"""Finds and loads a model by what a user types: a card, a folder or a training run."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from fairseq2.assets import AssetCard, AssetCardError, AssetDownloadError, AssetDownloadManager, AssetStore
from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.utils.structured import StructureError, ValueConverter
from fairseq2.utils.uri import Uri
from fairseq2.utils.yaml import YamlError, YamlLoader

from vembed_fs2.errors import ModelLoadError
from vembed_fs2.formats.checkpoint import HOW_TO_TRUST, NeedsCodeError, wants_code
from vembed_fs2.formats.download import FolderDownloadManager, download_repository, reason_of
from vembed_fs2.formats.folder import ModelFolder, is_model_folder
from vembed_fs2.hub.repositories import find_card_name, find_repository, list_repositories, log_once, suggest
from vembed_fs2.models.family import (
    FALLBACK_FAMILY,
    find_family,
    get_checkpoint_format,
    read_dialect_config,
    read_folder_config,
)
from vembed_fs2.resolver import get_resolver


@dataclass(frozen=True)
class ModelSource:
    """The origin, family and configuration of a model."""

    name: str
    """What the user typed, or the card that this stands for."""

    family: str
    config: Any
    """The configuration of the model, complete."""

    weights: Path | AssetCard
    folder: Path | None
    """The folder with the processor's files; ``None`` if they are on a hub."""

    def weights_path(self) -> Path:
        """The path of the checkpoint, which is downloaded if need be.

        :raises ModelLoadError: it cannot be fetched.
        """
        if isinstance(self.weights, Path):
            return self.weights

        try:
            uri = self.weights.field("checkpoint").as_uri()
            if uri.scheme == "file":
                return uri.to_path()
            return FolderDownloadManager(get_resolver().resolve(AssetDownloadManager)).download_model(uri)
        except AssetDownloadError as ex:
            raise ModelLoadError(f"{self.name} cannot be fetched: {reason_of(ex)}.") from ex
        except AssetCardError as ex:
            raise ModelLoadError(f"Card {self.name} does not say where its weights are: {ex}") from ex

    def processor_folder(self) -> Path:
        """The folder with the processor's files, downloaded if need be.

        :raises ModelLoadError: the card does not say where they are, or they cannot be fetched.
        """
        if self.folder is not None:
            return self.folder

        assert isinstance(self.weights, AssetCard)

        uri = self.weights.field("checkpoint").as_uri()
        if uri.scheme != "hg":
            raise ModelLoadError(f"Card {self.name}: {uri} is not a place to look for a tokenizer or image processor.")

        try:
            return download_repository(uri, weights=False)
        except AssetDownloadError as ex:
            raise ModelLoadError(f"Card {self.name}: the processor files cannot be fetched: {reason_of(ex)}.") from ex


def find_model(
    name_or_path: str | Path, resolver: DependencyResolver | None = None, *, trust_remote_code: bool = False
) -> ModelSource:
    """Find a model by card name, folder, run folder, checkpoint folder, or repository of the Hugging Face hub.

    A folder comes first, then a card of that name, then the card of that repository; a repository that no card
    has is downloaded.

    :param trust_remote_code: whether Python code that comes with the model may be run. Of cards, their own
        `trust_remote_code` says it.
    :raises ModelLoadError: there is none, or it is not supported.
    """
    resolver = resolver or get_resolver()
    path = Path(name_or_path).expanduser()
    if path.exists():
        if run := _find_run(path.absolute()):  # An absolute path also names the parents of `.`.
            return _open_run(str(name_or_path), *run, resolver, trust_remote_code)
        return _open_folder(str(name_or_path), path.resolve(), resolver, trust_remote_code)

    return _find_elsewhere(str(name_or_path), resolver, trust_remote_code)


def _find_elsewhere(name: str, resolver: DependencyResolver, trust_remote_code: bool) -> ModelSource:
    """Find a model that is no folder."""
    store = resolver.resolve(AssetStore)
    if "/" not in name:
        try:
            card = store.maybe_retrieve_card(name)
        except AssetCardError as ex:
            raise ModelLoadError(f"Card {name} cannot be read: {ex}") from ex
        if card is not None:
            return _open_card(name, card, resolver)

    repository, repositories = find_repository(name), list_repositories(resolver)
    card_name = find_card_name(repository or name, repositories)
    if card_name is not None:
        log_once(f"There is no folder {name}: loading the card {card_name}.")
        return _open_card(card_name, store.retrieve_card(card_name), resolver)

    if repository is not None:
        return _open_repository(name, repository, resolver, trust_remote_code)

    if "/" not in name:
        hint = suggest(name, store.asset_names, repositories)
        raise ModelLoadError(f"{name} is neither a folder nor the name of a card.{hint}")

    last = Path(name).name
    card_name = find_card_name(last, repositories)
    hint = "" if card_name is None else f" Without the folder, {last} is the card {card_name}."
    raise ModelLoadError(f"{name} does not exist.{hint}")


def _open_repository(name: str, repository: str, resolver: DependencyResolver, trust_remote_code: bool) -> ModelSource:
    uri = Uri.maybe_parse(f"hg://{repository}")
    assert uri is not None
    try:
        folder = download_repository(uri)
    except AssetDownloadError as ex:
        hint = suggest(repository, (), list_repositories(resolver))
        what = f"{name} does not exist, and" if name == repository else name
        raise ModelLoadError(f"{what} cannot be fetched from the Hugging Face hub: {reason_of(ex)}.{hint}") from ex

    log_once(f"There is no folder {name}: loading the repository of the Hugging Face hub, {folder}.")
    return _open_folder(name, folder, resolver, trust_remote_code)


def _open_card(name: str, card: AssetCard, resolver: DependencyResolver) -> ModelSource:
    field = card.maybe_get_field("model_family")
    if field is None:
        raise ModelLoadError(f"Card {name} does not describe a model: it has no `model_family`.")

    family_name = field.as_(str)
    family = resolver.maybe_resolve(ModelFamily, key=family_name)
    if family is None:
        raise ModelLoadError(f"Card {name} names the model family {family_name}, which is not known.")

    try:
        config = family.get_model_config(card)
    except AssetDownloadError as ex:
        raise ModelLoadError(f"Card {name} cannot be fetched: {reason_of(ex)}.") from ex
    except AssetCardError as ex:
        raise ModelLoadError(f"Card {name} cannot be read: {ex} {ex.__cause__ or ''}".rstrip()) from ex

    return ModelSource(name, family_name, config, card, local_folder(card))


def local_folder(card: AssetCard) -> Path | None:
    """The local folder that a card's checkpoint is in, if it is local."""
    field = card.maybe_get_field("checkpoint")
    if field is None or (uri := field.as_uri()).scheme != "file":
        return None

    path = uri.to_path()
    return path if path.is_dir() else path.parent


def _open_folder(name: str, path: Path, resolver: DependencyResolver, trust_remote_code: bool) -> ModelSource:
    folder = ModelFolder.open(path)
    if folder.dialect is not None:
        return ModelSource(name, *read_dialect_config(folder, resolver), path, path)

    model_type, code = folder.model_type, folder.config.get("auto_map") or {}
    try:
        # Without that, the code is left where it is, and the family that reads the type reads the model.
        uses_code = trust_remote_code and "AutoModel" in code
        family = FALLBACK_FAMILY if uses_code else find_family(model_type, resolver, has_code=bool(code))
        checkpoint_format = get_checkpoint_format(family, resolver)
        assert checkpoint_format is not None
        config = read_folder_config(path, checkpoint_format, trust_remote_code=trust_remote_code)
    except ModelLoadError as ex:
        # Families see the content of files, and not where they are.
        raise ex if str(path) in str(ex) else type(ex)(f"{path}: {ex}") from None

    return ModelSource(name, family, config, path, path)


def _find_run(path: Path) -> tuple[Path, Path | None] | None:
    """The checkpoint folder that ``path`` means, and the step folder if it names one."""
    for checkpoints, step in ((path, None), (path / "checkpoints", None), (path.parent, path)):
        if checkpoints.joinpath("model.yaml").is_file() and not is_model_folder(path):
            return checkpoints, step

    link = path / "checkpoints"
    if link.is_symlink() and not link.exists():
        raise ModelLoadError(f"{path}: its checkpoints are in {link.readlink()}, which does not exist.")

    return None


def _open_run(
    name: str, checkpoints: Path, step: Path | None, resolver: DependencyResolver, trust_remote_code: bool
) -> ModelSource:
    file = checkpoints / "model.yaml"
    try:
        metadata: Any = resolver.resolve(YamlLoader).load(file)[0]

        family_name = metadata["model_family"]
        family = resolver.maybe_resolve(ModelFamily, key=family_name)
        if family is None:
            raise ModelLoadError(f"{file} names the model family {family_name}, which is not known.")
        config = resolver.resolve(ValueConverter).structure(metadata["model_config"], family.config_kls)
    except (YamlError, LookupError, TypeError, StructureError, OSError) as ex:
        raise ModelLoadError(f"{file} is broken: {ex}") from ex

    if wants_code(metadata["model_config"]) and not trust_remote_code:
        raise NeedsCodeError(
            f"{file}: the model needs Python code of its own. Read it, and if you trust it, ask for it: {HOW_TO_TRUST}."
        )

    step = step or _best_step(checkpoints)
    weights = (step / "model").resolve()
    if not weights.is_dir():
        raise ModelLoadError(f"{step} has no model.")

    # A run that writes its checkpoints elsewhere puts the processor beside them.
    beside = checkpoints / "processor"
    processor = beside if beside.is_dir() else checkpoints.parent / "processor"
    return ModelSource(name, family_name, config, weights, processor)


def _best_step(checkpoints: Path) -> Path:
    """The step with the best score; the last one, if none was scored."""
    steps = {int(p.name[5:]): p for p in checkpoints.glob("step_*") if p.name[5:].isdigit()}
    if not steps:
        raise ModelLoadError(f"{checkpoints} has no checkpoint.")

    scores = {}
    for number in steps:
        file = checkpoints / "scores" / f"step_{number}.txt"
        try:
            scores[number] = float(file.read_text())
        except FileNotFoundError:
            continue
        except ValueError as ex:
            raise ModelLoadError(f"{file} must hold a number: {ex}.") from None

    # If a score is not a number, the model is broken.
    scores = {number: score for number, score in scores.items() if not isnan(score)}

    # If scores are equal the earlier step wins: less training for the same result.
    return steps[max(sorted(scores), key=scores.__getitem__) if scores else max(steps)]

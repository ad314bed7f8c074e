"""Finds and loads a model by what a user types: a card, a folder or a training run."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

from fairseq2.assets import AssetCard, AssetCardError, AssetDownloadError, AssetStore
from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import DependencyResolver
from fairseq2.utils.structured import StructureError, ValueConverter
from fairseq2.utils.yaml import YamlError, YamlLoader

from vembed_fs2.errors import ModelLoadError, did_you_mean
from vembed_fs2.formats.checkpoint import HOW_TO_TRUST, NeedsCodeError, wants_code
from vembed_fs2.formats.download import download_repository
from vembed_fs2.formats.folder import ModelFolder, is_model_folder
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
    """What the user typed."""

    family: str
    config: Any
    """The configuration of the model, complete."""

    weights: Path | AssetCard
    folder: Path | None
    """The folder with the processor's files; ``None`` if they are on a hub."""

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
            raise ModelLoadError(f"Card {self.name}: the processor files cannot be fetched. {ex}") from ex


def find_model(
    name_or_path: str | Path, resolver: DependencyResolver | None = None, *, trust_remote_code: bool = False
) -> ModelSource:
    """Find a model by card name, Hugging Face folder, run folder or checkpoint folder.

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

    if isinstance(name_or_path, Path) or "/" in name_or_path:
        # It may be the name of a repository on a hub, of which there is a card.
        cards = _card_names(resolver.resolve(AssetStore))
        hint = did_you_mean(str(name_or_path), cards, cutoff=0.8, form="the card '{}'")
        raise ModelLoadError(f"{name_or_path} does not exist.{hint}")

    return _open_card(name_or_path, resolver)


def _open_card(name: str, resolver: DependencyResolver) -> ModelSource:
    store = resolver.resolve(AssetStore)
    try:
        card = store.maybe_retrieve_card(name)
    except AssetCardError as ex:
        raise ModelLoadError(f"Card {name} cannot be read: {ex}") from ex

    if card is None:
        hint = did_you_mean(name, _card_names(store), most=3)
        raise ModelLoadError(f"{name} is neither a folder nor the name of a card.{hint}")

    field = card.maybe_get_field("model_family")
    if field is None:
        raise ModelLoadError(f"Card {name} does not describe a model: it has no `model_family`.")

    family_name = field.as_(str)
    family = resolver.maybe_resolve(ModelFamily, key=family_name)
    if family is None:
        raise ModelLoadError(f"Card {name} names the model family {family_name}, which is not known.")

    try:
        config = family.get_model_config(card)
    except (AssetCardError, AssetDownloadError) as ex:
        raise ModelLoadError(f"Card {name} cannot be read: {ex} {ex.__cause__ or ''}".rstrip()) from ex

    return ModelSource(name, family_name, config, card, local_folder(card))


def _card_names(store: AssetStore) -> list[str]:
    return [name.removesuffix("@") for name in store.asset_names]


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

"""The command line. Light: a verb's own module is imported only when it runs, torch later still."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from vembed_fs2.errors import did_you_mean


class CommandGroup(Protocol):
    """What an entry point of the group ``fairseq2.cli`` must be: the verbs of one package."""

    help: str
    """One line for ``fairseq2 --help``."""

    def main(self, argv: Sequence[str], prog: str) -> int:
        """Run ``argv`` (without the group's name) and return the exit status."""


class Verb(NamedTuple):
    """A verb. Its module has ``add_arguments(parser)`` and ``run(args) -> int``, and imports nothing heavy."""

    help: str
    module: str


_VERBS: Final[dict[str, Verb | dict[str, Verb]]] = {
    "train": Verb("train a model", "vembed_fs2.commands.train"),
    "evaluate": Verb("measure retrieval with a model", "vembed_fs2.commands.evaluate"),
    "export": Verb("write a model for other libraries", "vembed_fs2.commands.export"),
    "models": {
        "list": Verb("list families and cards", "vembed_fs2.commands.models_list"),
        "show": Verb("say what a model is and what it can do", "vembed_fs2.commands.models_show"),
        "archs": Verb("list the named architectures of families", "vembed_fs2.commands.models_archs"),
    },
    "data": {"check": Verb("summarize data files and list their problems", "vembed_fs2.commands.data_check")},
    "demo": {
        "data": Verb(
            "write a CSV of questions, answers and hard negatives to try things with", "vembed_fs2.commands.demo_data"
        ),
        "text": Verb("fine-tune a text model on Python documentation", "vembed_fs2.commands.demo_text"),
        "images": Verb("train a small model on handwritten digits", "vembed_fs2.commands.demo_images"),
    },
}

_GROUP_HELP: Final = {
    "data": "look at data files",
    "demo": "see it work, end to end",
    "models": "see what models there are",
}


class _Parser(argparse.ArgumentParser):
    """Adds the nearest name to the error of a wrong verb."""

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument \w+: invalid choice: '(.*)' \(choose from (.*)\)", message)
        if match is not None:
            known = [name.strip(" '") for name in match[2].split(",")]
            hint = did_you_mean(match[1], known) or f" Known: {', '.join(known)}."
            message = f"'{match[1]}' is not known.{hint}"

        super().error(message)


class _ShowVersion(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **options: Any) -> NoReturn:
        print(f"vembed_fs2 {version('vembed_fs2')}")
        parser.exit()


class VembedGroup:
    """The verbs of this package."""

    help = "embedding models: train, evaluate, run and ship them"

    def main(self, argv: Sequence[str], prog: str) -> int:
        parser = _Parser(prog=prog, description=self.help.capitalize() + ".")
        parser.add_argument("--version", action=_ShowVersion, help="print the version")
        parser.set_defaults(module=None)
        _add_verbs(parser, _VERBS, argv)

        args = parser.parse_args(argv)
        if args.module is None:
            parser.print_help()
            return 2

        return _run(args)


VEMBED: Final = VembedGroup()


class AssetsGroup:
    """fairseq2's own ``python -m fairseq2.assets``."""

    help = "list and show asset cards"

    def main(self, argv: Sequence[str], prog: str) -> int:
        from runpy import run_module

        sys.argv = [prog, *argv]

        try:
            run_module("fairseq2.assets", run_name="__main__")
        except SystemExit as ex:
            return ex.code if isinstance(ex.code, int) else 1 if ex.code else 0

        return 0


def main() -> None:
    """The ``fairseq2`` program: groups of verbs, found through the entry point group ``fairseq2.cli``."""
    parser = _Parser(prog="fairseq2", description="fairseq2 and the packages that extend it.")
    groups = parser.add_subparsers(dest="group", metavar="GROUP")
    found = {e.name: e for e in entry_points(group="fairseq2.cli")}

    argv = sys.argv[1:]
    name = argv[0] if argv else None
    if name == "assets":
        sys.exit(AssetsGroup().main(argv[1:], "fairseq2 assets"))

    if name in found:
        try:
            group: CommandGroup = found[name].load()
        except Exception as ex:
            print(f"error: {found[name].value} cannot be loaded: {ex}", file=sys.stderr)
            sys.exit(1)
        sys.exit(group.main(argv[1:], f"fairseq2 {name}"))

    groups.add_parser("assets", help=AssetsGroup.help)

    for entry_name, entry in sorted(found.items()):
        groups.add_parser(entry_name, help=_help_of(entry))

    parser.parse_args(argv)
    parser.print_help()
    sys.exit(2)


def _help_of(entry: EntryPoint) -> str:
    try:
        group: CommandGroup = entry.load()
        return group.help
    except Exception as ex:  # One broken package must not take the others' help away.
        return f"(cannot be loaded: {ex})"


def vembed_main() -> None:
    """The ``vembed`` program: the same as ``fairseq2 vembed``."""
    sys.exit(VEMBED.main(sys.argv[1:], "vembed"))


def _add_verbs(parser: argparse.ArgumentParser, verbs: dict[str, Verb | dict[str, Verb]], argv: Sequence[str]) -> None:
    """Add all verbs, but the arguments of the one that is asked for only: the others need not be imported."""
    subparsers = parser.add_subparsers(metavar="VERB")
    for name, verb in verbs.items():
        is_asked = bool(argv) and argv[0] == name
        if isinstance(verb, dict):
            child = subparsers.add_parser(
                name, help=_GROUP_HELP[name], description=_GROUP_HELP[name].capitalize() + "."
            )
            inner: dict[str, Verb | dict[str, Verb]] = dict(verb)
            _add_verbs(child, inner, argv[1:] if is_asked else [])
            continue

        child = subparsers.add_parser(name, help=verb.help, description=verb.help.capitalize() + ".")
        child.set_defaults(module=verb.module)

        if is_asked:
            import_module(verb.module).add_arguments(child)


def _run(args: argparse.Namespace) -> int:
    from vembed_fs2.errors import VembedError

    try:
        status: int = import_module(args.module).run(args)
    except BrokenPipeError:
        return 1
    except (VembedError, OSError) as ex:
        if getattr(args, "traceback", False):
            raise
        print(f"error: {ex}", file=sys.stderr)
        return 2 if isinstance(ex, VembedError) else 1  # The latter: a folder that cannot be written, a full disk.
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130

    return status

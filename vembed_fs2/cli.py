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
    "completion": Verb("write a script with which a shell completes commands", "vembed_fs2.commands.completion"),
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
    """Adds the nearest name to the error of a wrong verb, option or choice."""

    asked: argparse.ArgumentParser | None = None
    """The parser of the verb that is to be run, of which this one reports the options that are not known."""

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument ([^:]+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if match is not None:
            known = [name.strip(" '") for name in match[3].split(",")]
            hint = did_you_mean(match[2], known) or f" Known: {', '.join(known)}."
            place = f"{match[1]}: " if match[1].startswith("-") else ""
            message = f"{place}'{match[2]}' is not known.{hint}"

        elif message.startswith("unrecognized arguments: "):
            option = next((word for word in message.split() if word.startswith("-")), "").partition("=")[0]
            hint = did_you_mean(option, options_of(self.asked or self)) if option else ""
            message += f".{hint}" if hint else ""

        super().error(message)


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser that begin with two dashes."""
    return [name for action in parser._actions for name in action.option_strings if name.startswith("--")]


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
        parser = self.create_parser(prog, argv)
        args = parser.parse_args(argv)
        if args.module is None:
            parser.print_help()
            return 2

        return _run(args)

    def create_parser(self, prog: str, argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
        """Create the parser of all verbs.

        :param argv: says whose arguments are needed; those of all verbs if ``None``.
        """
        parser = _Parser(prog=prog, description=self.help.capitalize() + ".")
        parser.add_argument("--version", action=_ShowVersion, help="print the version")
        parser.set_defaults(module=None)
        parser.asked = _add_verbs(parser, _VERBS, argv)
        return parser


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


def _add_verbs(
    parser: argparse.ArgumentParser, verbs: dict[str, Verb | dict[str, Verb]], argv: Sequence[str] | None
) -> argparse.ArgumentParser | None:
    """Add all verbs, but the arguments of the one that is asked for only: the others need not be imported.

    :param argv: ``None`` asks for all of them.
    :returns: the parser of the verb that is asked for.
    """
    subparsers = parser.add_subparsers(metavar="VERB")
    asked: argparse.ArgumentParser | None = None
    for name, verb in verbs.items():
        is_asked = argv is None or (len(argv) > 0 and argv[0] == name)
        if isinstance(verb, dict):
            child = subparsers.add_parser(
                name, help=_GROUP_HELP[name], description=_GROUP_HELP[name].capitalize() + "."
            )
            inner: dict[str, Verb | dict[str, Verb]] = dict(verb)
            rest = argv[1:] if argv and is_asked else None if is_asked else []
            asked = _add_verbs(child, inner, rest) or (child if is_asked else asked)
            continue

        child = subparsers.add_parser(name, help=verb.help, description=verb.help.capitalize() + ".")
        child.set_defaults(module=verb.module)

        if is_asked:
            import_module(verb.module).add_arguments(child)
            asked = child

    return asked


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

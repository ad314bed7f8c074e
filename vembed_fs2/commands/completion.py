"""``fairseq2 vembed completion``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

_GROUP: Final = ("vembed",)

_SAFE: Final = re.compile(r"[\w./@:+=-]+")
"""Words that mean themselves in every shell."""

_FILES: Final = {"FILE", "DATA", "MODEL", "RUN", "DIR", "FOLDER", "OUTPUT_DIR", "OUT"}
"""Arguments, by their metavar, that may be files or folders."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    nodes = list_nodes()
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](nodes), end="")
    return 0


@dataclass
class Values:
    """What may stand in one place of a command."""

    words: Sequence[str] = ()
    is_file: bool = False

    takes: str = ""
    """Of an option: nothing, ``one`` value or ``many``."""

    help: str = ""


@dataclass
class Node:
    """A verb, or a group of verbs."""

    path: tuple[str, ...]
    verbs: dict[str, str] = field(default_factory=dict)
    """The verbs of a group, with their help."""

    options: dict[str, Values] = field(default_factory=dict)
    places: Values = field(default_factory=Values)
    """What may stand where no option is."""


def list_nodes() -> list[Node]:
    """Return all that can be typed, from the parsers of the verbs and from what is registered."""
    from vembed_fs2.cli import VEMBED

    known = _known_names()
    return list(_walk(VEMBED.create_parser("vembed"), _GROUP, known))


def _known_names() -> Mapping[str, Sequence[str]]:
    """Return the names that arguments take, by their metavar."""
    from vembed_fs2.data.schema import MODES
    from vembed_fs2.formats.registry import list_layouts
    from vembed_fs2.hub.catalog import embedding_families, family_cards
    from vembed_fs2.recipes.presets import presets_of
    from vembed_fs2.recipes.train.config import TrainConfig
    from vembed_fs2.resolver import get_resolver

    resolver = get_resolver()
    families = sorted(embedding_families(resolver))
    cards = sorted(card.name for family in families for card in family_cards(family, resolver))

    return {
        "MODEL": cards,
        "RUN": cards,
        "FAMILY": families,
        "LAYOUT": sorted(layout.name for layout in list_layouts() if layout.write is not None),
        "NAME": ["list", *presets_of("vembed_fs2.recipes.train")],  # Of `--preset`.
        "MODE": MODES,
        "DEVICE": ["cpu", "cuda"],
        "KEY=VALUE": sorted(_keys(TrainConfig())),
    }


def _keys(config: object) -> Iterator[str]:
    """Yield the dotted keys of a configuration, each with ``=``."""
    from fairseq2.utils.structured import StandardValueConverter

    def walk(values: Any, path: str) -> Iterator[str]:
        if not isinstance(values, Mapping) or not values:
            yield f"{path}="
            return
        for key, value in values.items():
            yield from walk(value, f"{path}.{key}" if path else key)

    yield from walk(StandardValueConverter().unstructure(config), "")


def _walk(parser: argparse.ArgumentParser, path: tuple[str, ...], known: Mapping[str, Sequence[str]]) -> Iterator[Node]:
    node = Node(path)
    yield node

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            node.verbs = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, child in action.choices.items():
                yield from _walk(child, (*path, name), known)
            continue

        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        choices = known.get(metavar, ()) if action.choices is None else map(str, action.choices)
        words = [word for word in choices if _SAFE.fullmatch(word)]
        is_file = metavar in _FILES or (action.type is not None and getattr(action.type, "__name__", "") == "Path")
        takes = "" if action.nargs == 0 else "many" if action.nargs in ("*", "+") else "one"

        values = Values(words, is_file, takes, (action.help or "").replace("%%", "%"))
        for name in action.option_strings:
            if name.startswith("--"):
                node.options[name] = values

        if not action.option_strings:
            node.places = Values([*node.places.words, *words], node.places.is_file or is_file)


_TITLE: Final = "# Completes `vembed` and `fairseq2 vembed`; written by `fairseq2 vembed completion`."

_BASH: Final = """\
_vembed() {
    local current="${COMP_WORDS[COMP_CWORD]}" node="" option="" word takes words files i
    [[ "$current" == "=" ]] && current=""
    [[ "${COMP_WORDS[0]##*/}" == vembed ]] && node=" vembed"

    for ((i = 1; i < COMP_CWORD; i++)); do
        word="${COMP_WORDS[i]}"
        case "$word" in
            =) continue ;;
            -*) option="$word" ;;
            *)
                _vembed_look "$node" "$option"
                if [[ -z "$takes" ]]; then
                    option=""
                    _vembed_is_node "$node $word" && node="$node $word"
                elif [[ "$takes" == one ]]; then
                    option=""
                fi
                ;;
        esac
    done

    local found=""
    _vembed_look "$node" "$option"
    if [[ -n "$takes" ]]; then
        found="$words"
    fi
    local from_option="$takes" option_files="$files"
    if [[ "$from_option" != one ]]; then
        _vembed_look "$node" ""
        found="$found $words"
        [[ "$from_option" == many ]] && files="$option_files"
    fi

    local IFS=$' \\t\\n'
    COMPREPLY=($(compgen -W "$found" -- "$current"))
    if [[ "${#COMPREPLY[@]}" == 1 && "${COMPREPLY[0]}" == *= ]]; then
        compopt -o nospace 2>/dev/null
    fi
    if [[ -n "$files" ]]; then
        IFS=$'\\n'
        COMPREPLY+=($(compgen -f -- "$current"))
        compopt -o filenames 2>/dev/null
    fi
}
"""


def _bash(nodes: Sequence[Node]) -> str:
    looks, paths = [], []
    root = Node((), {"vembed": "", "assets": ""})
    for node in [root, *nodes]:
        path = "".join(f" {name}" for name in node.path)
        paths.append(f'"{path}"')
        words = " ".join([*node.verbs, *node.options, *node.places.words])
        looks.append(_bash_case(f"{path}|", "", words, node.places.is_file))
        for name, values in node.options.items():
            if values.takes:
                looks.append(_bash_case(f"{path}|{name}", values.takes, " ".join(values.words), values.is_file))

    lines = [
        _TITLE,
        "_vembed_is_node() {",
        '    case "$1" in',
        f"        {' | '.join(paths)}) return 0 ;;",
        "    esac",
        "    return 1",
        "}",
        "_vembed_look() {",
        '    takes="" words="" files=""',
        '    case "$1|$2" in',
        *looks,
        "    esac",
        "}",
    ]
    return "\n".join(lines) + f"\n{_BASH}complete -F _vembed vembed fairseq2\n"


def _bash_case(pattern: str, takes: str, words: str, is_file: bool) -> str:
    return f'        "{pattern}") takes="{takes}" words="{words}" files="{"yes" if is_file else ""}" ;;'


def _zsh(nodes: Sequence[Node]) -> str:
    return f"autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n{_bash(nodes)}"


def _fish(nodes: Sequence[Node]) -> str:
    lines = [_TITLE]
    lines += _fish_line("fairseq2", "__fish_use_subcommand", f"-f -a {_quote('vembed assets')}")
    for node in nodes:
        for program, path in (("vembed", node.path[1:]), ("fairseq2", node.path)):
            conditions = [f"__fish_seen_subcommand_from {name}" for name in path]
            if node.verbs:
                conditions.append(f"not __fish_seen_subcommand_from {' '.join(node.verbs)}")
            condition = "; and ".join(conditions)

            for verb, text in node.verbs.items():
                lines += _fish_line(program, condition, f"-f -a {verb} -d {_quote(text)}")
            for name, values in node.options.items():
                value = f" -r{'F' if values.is_file else 'f'}" if values.takes else ""
                words = f" -a {_quote(' '.join(values.words))}" if values.words else ""
                lines += _fish_line(program, condition, f"-l {name[2:]}{value}{words} -d {_quote(values.help)}")
            if not node.verbs:
                kind = "-F" if node.places.is_file else "-f"
                words = f" -a {_quote(' '.join(node.places.words))}" if node.places.words else ""
                lines += _fish_line(program, condition, f"{kind}{words}")

    return "\n".join(lines) + "\n"


def _fish_line(program: str, condition: str, rest: str) -> list[str]:
    return [f"complete -c {program} -n {_quote(condition)} {rest}"]


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"

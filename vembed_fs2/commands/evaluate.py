"""``fairseq2 vembed evaluate``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from vembed_fs2.commands.arguments import add_quoting_argument, add_trust_argument, parse_columns
from vembed_fs2.dtypes import AUTO, DTYPE_NAMES, dtype_name, find_dtype
from vembed_fs2.errors import ConfigError
from vembed_fs2.recipes.evaluate.settings import RESULTS_FILE, EvaluateDataSection, EvaluateSettings

if TYPE_CHECKING:
    from vembed_fs2.inference.embedder import Embedder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder, run, card or repository of the Hugging Face hub")
    parser.add_argument(
        "data",
        nargs="*",
        type=Path,
        metavar="DATA",
        help="rows or folders of classes as for training, or a folder with queries, corpus, qrels",
    )
    parser.add_argument("--queries", type=Path, metavar="FILE", help="rows of _id and text or image")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="rows of _id and text or image")
    parser.add_argument("--qrels", type=Path, metavar="FILE", help="query-id, corpus-id, score; or TREC's four columns")
    parser.add_argument("--split", default="test", help="which qrels of a folder (default: test)")
    parser.add_argument("--baseline", metavar="MODEL", help="another model, to show what changed")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--ks",
        type=_positive,
        nargs="+",
        metavar="K",
        help="cut-offs (default: 1 5 10; and 100 1000 for rows with a label only)",
    )
    parser.add_argument("--mode", default="auto", help="what rows consist of: t2t, t2i, i2t, i2i, m2i, m2t or auto")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the file's name for a field; can be repeated",
    )
    add_quoting_argument(parser)
    parser.add_argument(
        "--ties",
        choices=("corpus", "trec_eval"),
        default="corpus",
        help="documents of the same score: in the order of the corpus, or greatest id first (default: corpus)",
    )
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="folder that images lie in")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest text in tokens")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="most inputs per forward pass")
    parser.add_argument(
        "--truncate-dim", type=_positive, metavar="N", help="keep this many leading dimensions (default: all)"
    )
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "int8", "uint8", "binary", "ubinary"),
        help="quantize embeddings before they are compared (default: float32)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--dtype",
        choices=[AUTO, *DTYPE_NAMES],
        default="float32",
        help="type of the weights (default: float32); auto is bfloat16 where the hardware multiplies it natively",
    )
    precision.add_argument("--bf16", action="store_true", help="compute in bfloat16 with weights in float32 (autocast)")
    parser.add_argument(
        "--nproc-per-node", type=_positive, metavar="N", help="share the work among N processes on this machine"
    )
    add_trust_argument(parser)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Evaluate the model (and the baseline) and print the table."""
    from vembed_fs2.files import check_file

    if args.output is not None:
        check_file(args.output)

    if not args.data and None in (args.queries, args.corpus, args.qrels):
        raise ConfigError("Give DATA, or all of --queries, --corpus and --qrels.", where="The command line")

    settings = _read_settings(args)
    if args.nproc_per_node is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _run_gang(settings, args)

    return _run_here(settings, args)


def _read_settings(args: argparse.Namespace) -> EvaluateSettings:
    data = EvaluateDataSection(
        paths=args.data,
        queries=args.queries,
        corpus=args.corpus,
        qrels=args.qrels,
        split=args.split,
        columns=parse_columns(args.column),
        mode=args.mode,
        image_root=args.image_root,
        quoting=args.quoting,
        ties=args.ties,
    )

    return EvaluateSettings(
        model=args.model,
        baseline=args.baseline or None,
        data=data,
        ks=args.ks,
        max_length=args.max_length,
        batch_size=args.batch_size,
        truncate_dim=args.truncate_dim,
        precision=args.precision,
        dtype=dtype_name(find_dtype(args.dtype, args.device)),
        bf16=args.bf16,
        trust_remote_code=args.trust_remote_code,
    )


def _run_here(settings: EvaluateSettings, args: argparse.Namespace) -> int:
    """Evaluate in this process, which needs neither a gang nor a folder."""
    from vembed_fs2.console import Screen
    from vembed_fs2.recipes.evaluate.evaluate import (
        evaluate_models,
        load_embedder,
        load_task,
        show_results,
        write_report,
    )

    def load(name: str) -> Embedder:
        return load_embedder(name, settings, args.device)

    with Screen() as screen:
        results = evaluate_models(settings, load_task(settings.data), load, screen)

    show_results(settings, results)
    if args.output is not None:
        write_report(args.output, settings, results)
    return 0


def _run_gang(settings: EvaluateSettings, args: argparse.Namespace) -> int:
    """Run the recipe. It prints the results, and writes a folder, which is wanted for its logs if it fails."""
    from vembed_fs2.files import read_json, write_json
    from vembed_fs2.recipes.arguments import add_recipe_arguments
    from vembed_fs2.recipes.launch import run_recipe

    if args.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda on several processes, but is {args.device!r}.")
    if args.device == "cpu":
        os.environ["FAIRSEQ2_DEVICE"] = "cpu"

    folder = Path(mkdtemp(prefix="vembed_evaluate_"))
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    values = [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in asdict(settings).items()]
    launch = [] if args.nproc_per_node is None else ["--nproc-per-node", str(args.nproc_per_node)]
    command = [str(folder), *launch, "--config", *values]

    status = run_recipe("vembed_fs2.recipes.evaluate", parser.parse_args(command))
    if status == 0 and args.output is not None and (file := folder / RESULTS_FILE).exists():
        write_json(args.output, read_json(file))  # Only the first process of the gang has it.

    if status == 1:
        print(f"The log files are in {folder / 'logs'}.", file=sys.stderr)
    else:
        rmtree(folder, ignore_errors=True)

    return status

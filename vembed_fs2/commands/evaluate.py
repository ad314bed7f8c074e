"""``fairseq2 vembed evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vembed_fs2.commands.arguments import add_trust_argument

if TYPE_CHECKING:
    from vembed_fs2.evaluation.task import RetrievalTask
    from vembed_fs2.inference.embedder import Embedder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="card, Hugging Face folder, run folder or checkpoint folder")
    parser.add_argument(
        "data",
        nargs="*",
        type=Path,
        metavar="DATA",
        help="rows as for training, or a folder with queries, corpus, qrels",
    )
    parser.add_argument("--queries", type=Path, metavar="FILE", help="rows of _id and text or image")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="rows of _id and text or image")
    parser.add_argument("--qrels", type=Path, metavar="FILE", help="query-id, corpus-id, score; or TREC's four columns")
    parser.add_argument("--split", default="test", help="which qrels of a folder (default: test)")
    parser.add_argument("--baseline", metavar="MODEL", help="another model, to show what changed")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--ks", type=_positive, nargs="+", default=[1, 5, 10], metavar="K", help="cut-offs (default: 1 5 10)"
    )
    parser.add_argument("--mode", default="auto", help="what rows consist of: t2t, t2i, i2t, i2i, m2i, m2t or auto")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="the file's name for a field; can be repeated",
    )
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="folder that images lie in")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest text in tokens")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="most inputs per forward pass")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    add_trust_argument(parser)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Evaluate the model (and the baseline) and print the table."""
    from vembed_fs2.evaluation.report import print_results, write_results
    from vembed_fs2.files import check_file

    if args.output is not None:
        check_file(args.output)
    task = load_task(args)
    names = [args.baseline, args.model] if args.baseline else [args.model]
    results = {name: _evaluate(name, task, args) for name in names}
    print_results(results, title=f"{len(task.queries):,} queries, {len(task.corpus):,} documents")
    if args.output is not None:
        about = {"data": [str(p) for p in args.data], "max_length": args.max_length, "bf16": args.bf16}
        if args.baseline:
            about |= {"baseline": args.baseline, "baseline_metrics": results[args.baseline]}
        write_results(args.output, results[args.model], model=args.model, **about)
    return 0


def load_task(args: argparse.Namespace) -> RetrievalTask:
    """Read what to evaluate on.

    :raises VembedError: the arguments do not name it, or it cannot be read.
    """
    from vembed_fs2.commands.arguments import parse_columns
    from vembed_fs2.data.dataset import ExampleDataset
    from vembed_fs2.errors import VembedError
    from vembed_fs2.evaluation.datasets import task_from_examples, task_from_files, task_from_folder

    triple = [args.queries, args.corpus, args.qrels]
    if any(triple):
        if args.data or not all(triple):
            raise VembedError("Give DATA, or all of --queries, --corpus and --qrels.")
        return task_from_files(*triple, image_root=args.image_root)
    if not args.data:
        raise VembedError("Give DATA: files of rows, or a folder with queries, corpus and qrels.")
    if len(args.data) == 1 and args.data[0].is_dir() and any(args.data[0].glob("qrels*")):
        return task_from_folder(args.data[0], args.split, image_root=args.image_root)
    dataset = ExampleDataset(args.data, columns=parse_columns(args.column), mode=args.mode, image_root=args.image_root)
    return task_from_examples(list(dataset))


def _evaluate(name: str, task: RetrievalTask, args: argparse.Namespace) -> dict[str, float]:
    from vembed_fs2.evaluation.retrieval import evaluate_embedder

    embedder = load_embedder(
        name,
        device=args.device,
        max_length=args.max_length,
        bf16=args.bf16,
        trust_remote_code=args.trust_remote_code,
    )
    return evaluate_embedder(
        embedder,
        task,
        batch_size=args.batch_size,
        ks=args.ks,
        similarity="dot" if embedder.model.similarity == "dot" else "cosine",
    )


def load_embedder(
    name: str, *, device: str | None, max_length: int | None, bf16: bool, trust_remote_code: bool = False
) -> Embedder:
    """Load a model to evaluate."""
    import torch

    from vembed_fs2.inference.embedder import Embedder

    embedder = Embedder.load(name, device=device, max_length=max_length, trust_remote_code=trust_remote_code)
    embedder.autocast_dtype = torch.bfloat16 if bf16 else None
    return embedder

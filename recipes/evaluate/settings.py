"""What to evaluate, on what, and how. Light: the command line reads it before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

RESULTS_FILE: Final = "results.json"
"""The file that the recipe writes to its folder."""


@dataclass(kw_only=True)
class EvaluateDataSection:
    """The queries, the documents, and which belong together: ``paths``, or the three files."""

    paths: Sequence[Path] = field(default_factory=list)
    """
    Files of rows or folders of classes as for training, or one folder with queries, corpus and qrels (patterns and
    ``~`` as well).
    """

    queries: Path | None = None
    """A file of queries: ``_id``, and ``text`` or ``image``."""

    corpus: Path | None = None
    """A file of documents: ``_id``, and ``text`` or ``image``."""

    qrels: Path | None = None
    """A file of judgements: query, document, grade; or TREC's four columns."""

    split: str = "test"
    """Which judgements of a folder."""

    columns: dict[str, str | list[str] | None] = field(default_factory=dict)
    """Our field -> the column of files of rows; ``None`` leaves the field out."""

    mode: str = "auto"
    """What the queries and documents of rows consist of: t2t, t2i, i2t, i2i, m2i, m2t or auto."""

    image_root: Path | None = None
    """The folder that images must lie in; the folder of the data file by default."""

    quoting: str = "rfc4180"
    """How CSV and TSV files are quoted: rfc4180, or none if a quote is a character like any other."""

    ties: str = "corpus"
    """Which of two documents with the same score comes first: by the order of the corpus, or as trec_eval has it."""


@dataclass(kw_only=True)
class EvaluateSettings:
    """An evaluation, without what only a gang needs."""

    model: str = ""
    """A folder, a run, a card or a repository of the Hugging Face hub."""

    baseline: str | None = None
    """Another model, to show what changed."""

    data: EvaluateDataSection = field(default_factory=EvaluateDataSection)

    ks: Sequence[int] | None = None
    """The cut-offs of ``recall@k`` and ``hit@k``: 1, 5 and 10 by default; and 100 and 1,000 where rows of labels are
    searched among themselves."""

    max_length: int | None = None
    """The longest text in tokens, if it is not the model's own."""

    batch_size: int | None = None
    """The most inputs per forward pass; chosen by their length if ``None``."""

    truncate_dim: int | None = None
    """The number of leading dimensions that are kept; all if ``None``."""

    precision: str = "float32"
    """What embeddings are quantized to before they are compared: float32, int8, uint8, binary or ubinary."""
    dtype: str = "float32"
    """The type of the weights, or ``auto``: bfloat16 where the hardware multiplies it natively, else float32."""

    bf16: bool = False
    """If ``True``, models compute in bfloat16 by autocast, whatever the type of their weights."""

    trust_remote_code: bool = False
    """If ``True``, Python code that comes with a model is run. It can do anything."""

    @property
    def models(self) -> list[str]:
        """The models, in the order in which they are shown."""
        return [self.model] if self.baseline is None else [self.baseline, self.model]

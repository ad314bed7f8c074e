from __future__ import annotations

from dataclasses import replace

from vembed_fs2.embedding.model import HeadConfig

from ..families import Case
from ..steps import BERT, texts

CASES = {
    "one vector": Case("vembed_bert", BERT, texts, texts),
    "a vector per token": Case("vembed_bert", replace(BERT, head=HeadConfig(pooling="none")), texts, texts),
}

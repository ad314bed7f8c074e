"""Heads of images by the names that plugins know: one head serves texts and images now.

What is imported from here can be imported for one version more; see :mod:`vembed_fs2.embedding.head`.
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from vembed_fs2.embedding.head import Head, HeadConfig, States, head_output_dim, validate_head
from vembed_fs2.embedding.head import ImageHeadConfig as ImageHeadConfig
from vembed_fs2.embedding.head import Pooling as ImagePooling  # noqa: F401

image_head_output_dim = head_output_dim


def validate_image_head(
    head: HeadConfig, *, has_class_token: bool = True, has_pooler: bool = False, name: str = "head"
) -> list[str]:
    """Return what is wrong with a head without dense layers, one sentence each."""
    return validate_head(head, 0, multi_vector=True, has_class_token=has_class_token, has_pooler=has_pooler, name=name)


class ImageHead(Head):
    """A head of images that takes their states alone."""

    def __init__(self, config: HeadConfig, num_prefix_tokens: int = 1) -> None:
        super().__init__(config, 0)
        self.num_prefix_tokens = num_prefix_tokens

    @override
    def forward(self, seqs: Tensor, *, pooled: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(States(seqs, None, pooled, self.num_prefix_tokens))[0]

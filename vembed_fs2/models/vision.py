"""Moved; what plugins import from here can be imported for one version more."""

from __future__ import annotations

from vembed_fs2._moved import forward_names

__getattr__ = forward_names(
    __name__,
    {
        "ImageHead": "vembed_fs2.embedding.image_head",
        "ImageHeadConfig": "vembed_fs2.embedding.image_head",
        "image_head_output_dim": "vembed_fs2.embedding.image_head",
        "validate_image_head": "vembed_fs2.embedding.image_head",
        "PatchLayout": "vembed_fs2.models.common.vision",
        "PatchProjection": "vembed_fs2.models.common.vision",
        "LayerScale": "vembed_fs2.models.common.vision",
        "BranchResidual": "vembed_fs2.models.common.vision",
        "resize_positions": "vembed_fs2.models.common.vision",
    },
)

"""Moved; what plugins import from here can be imported for one version more."""

from __future__ import annotations

from vembed_fs2._moved import forward_names

__getattr__ = forward_names(
    __name__,
    {
        "EmbeddingModel": "vembed_fs2.embedding.model",
        "EmbeddingModelConfig": "vembed_fs2.embedding.model",
        "Embeddings": "vembed_fs2.embedding.model",
        "Modality": "vembed_fs2.embedding.model",
        "Similarity": "vembed_fs2.embedding.model",
        "SingleSimilarity": "vembed_fs2.embedding.model",
        "TextPadding": "vembed_fs2.embedding.model",
        "EncoderBatch": "vembed_fs2.embedding.batch",
        "HeadConfig": "vembed_fs2.embedding.model",
        "DenseConfig": "vembed_fs2.embedding.model",
        "Pooling": "vembed_fs2.embedding.model",
    },
)

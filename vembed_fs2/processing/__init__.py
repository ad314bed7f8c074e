"""Texts and images -> :class:`~vembed_fs2.models.embedding.EncoderBatch`."""

"""Texts and images -> :class:`~vembed_fs2.embedding.model.EncoderBatch`."""

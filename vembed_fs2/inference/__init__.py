"""Texts and images in, embeddings out."""

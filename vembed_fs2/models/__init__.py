"""Embedding model families."""

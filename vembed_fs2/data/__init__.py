"""Rows of training and evaluation data."""

"""Recipes: training and evaluation as fairseq2 runs them."""

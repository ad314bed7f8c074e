"""Recipes: training and evaluation on gangs, as fairseq2 runs them."""

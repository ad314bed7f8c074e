"""``fairseq2 vembed train``."""

from __future__ import annotations

import argparse

from vembed_fs2.recipes.arguments import add_recipe_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a recipe."""
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the recipe."""
    from vembed_fs2.recipes.launch import run_recipe

    return run_recipe("vembed_fs2.recipes.train", args)

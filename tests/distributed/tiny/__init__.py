"""Small models of each family for ``tests.distributed.families``: each module has ``CASES``, by name."""

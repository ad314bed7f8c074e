"""Model folders as they lie on disk: reading them."""

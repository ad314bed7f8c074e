"""A package that adds an architecture, a family, a card and a verb to fairseq2 and vembed_fs2."""

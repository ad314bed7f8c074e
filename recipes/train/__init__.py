"""The training recipe."""

from vembed_fs2.recipes.processes import RESUME

ADVICE = RESUME
"""What to do after a process was killed."""

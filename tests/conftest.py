"""Lets tests import fairseq2 first, also on machines without libsndfile."""

from __future__ import annotations

import vembed_fs2  # noqa: F401

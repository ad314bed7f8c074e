"""Gradient cache: contrastive training with batches larger than memory, exact to rounding.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", 2021, https://arxiv.org/abs/2101.06983. Needs torch only.
"""

from vembed_fs2.gradcache.engine import GradCache as GradCache
from vembed_fs2.gradcache.engine import StepStats as StepStats
from vembed_fs2.gradcache.functional import cached as cached
from vembed_fs2.gradcache.functional import cached_loss as cached_loss
from vembed_fs2.gradcache.planner import parse_budget as parse_budget
from vembed_fs2.gradcache.planner import plan_chunks as plan_chunks

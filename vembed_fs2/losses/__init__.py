"""Objectives. Each takes embeddings of all roles of a rank's rows; torch only."""

from vembed_fs2.losses.common import MAX_LOGIT_SCALE as MAX_LOGIT_SCALE
from vembed_fs2.losses.common import LossInput as LossInput
from vembed_fs2.losses.common import LossOutput as LossOutput
from vembed_fs2.losses.common import Objective as Objective
from vembed_fs2.losses.common import RowInfo as RowInfo
from vembed_fs2.losses.infonce import InfoNCE as InfoNCE
from vembed_fs2.losses.infonce import InfoNCEConfig as InfoNCEConfig
from vembed_fs2.losses.registry import LOSSES as LOSSES
from vembed_fs2.losses.registry import create_loss as create_loss

from __future__ import annotations

from ..families import Case
from ..mixed import CONFIG, rows

CASES = {"Qwen3-VL": Case("vembed_qwen3_vl", CONFIG, rows, rows)}

# SPDX-License-Identifier: Apache-2.0
"""From any readable checkpoint to any format that can be written, one tensor in memory at a time."""

from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.convert import Conversion, convert, plan
from conversion.plan import Plan
from conversion.verify import Comparison, compare

__all__ = [
    "Checkpoint",
    "Comparison",
    "Conversion",
    "Plan",
    "compare",
    "convert",
    "open_checkpoint",
    "plan",
]

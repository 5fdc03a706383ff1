# SPDX-License-Identifier: Apache-2.0
"""From any readable checkpoint to the one canonical spelling, one tensor in memory at a time."""

from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.convert import Conversion, convert

__all__ = ["Checkpoint", "Conversion", "convert", "open_checkpoint"]

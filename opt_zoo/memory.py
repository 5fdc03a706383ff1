# SPDX-License-Identifier: Apache-2.0
"""How much memory this process has taken at most."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The largest resident size so far, in bytes, file pages included.

    On Linux `ru_maxrss` starts at that of the process which started this one, so the system's own
    record is read from /proc where there is one.
    """
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

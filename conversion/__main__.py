# SPDX-License-Identifier: Apache-2.0
"""`python -m conversion`."""

import signal
import sys
from types import FrameType
from typing import NoReturn

from conversion.cli import main


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # as an exception: unfinished files are removed


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit)
    sys.exit(main())

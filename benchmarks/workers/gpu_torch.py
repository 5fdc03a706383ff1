# SPDX-License-Identifier: Apache-2.0
"""Cases of `benchmarks/gpu.py` in PyTorch: `python gpu_torch.py REQUEST`; see `gpu_race.serve`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # runs in a source tree, installed or not

from benchmarks.gpu_device import TorchDevice
from benchmarks.gpu_jobs import CONTESTS
from benchmarks.gpu_race import Request, serve


def main() -> None:
    request = Request.read(sys.argv[1])
    device = TorchDevice(request.device)
    serve(request, lambda case: CONTESTS[case.section](case, device), device)


if __name__ == "__main__":
    main()

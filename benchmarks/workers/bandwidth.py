# SPDX-License-Identifier: Apache-2.0
"""How fast memory can be read: `python bandwidth.py ANYTHING BYTES` sums up such an array, on all cores."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from serving import Decoder, Tokens, serve


class Bandwidth(Decoder):
    """A sum of integers, which numpy adds up as fast as they arrive; one part for each core."""

    modules = ("numpy",)

    def __init__(self, _: str, size: str) -> None:
        threads = os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(threads)
        self.parts = np.array_split(np.ones(int(size) // 8, np.int64), threads)

    def generate(self, prompts: Tokens, new_tokens: int) -> Tokens:
        return [[sum(map(int, self.pool.map(np.sum, self.parts)))]]


if __name__ == "__main__":
    serve(Bandwidth)

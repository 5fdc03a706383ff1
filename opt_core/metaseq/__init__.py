# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of metaseq, in which OPT was trained and first published. They are only read.

Any of its forms is seen as one mapping of names to tensors: one file or a grid of model-parallel
parts and FSDP shards, flattened or not, with the query, key and value projections fused or not.
"""

from opt_core.metaseq.reader import MetaseqReader, is_metaseq, open_metaseq

__all__ = ["MetaseqReader", "is_metaseq", "open_metaseq"]

# SPDX-License-Identifier: Apache-2.0
"""The framework-neutral core of opt-zoo: what an OPT model *is*, decided once, as data.

Shape alphabet, used in every shape comment of the project:

    B batch   T query positions   S key positions   N attention heads   H head size
    D hidden  F feed-forward      E word embedding  V vocabulary        L layers
"""

from opt_core.config import OPTConfig
from opt_core.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    HubError,
    InputError,
    OPTError,
    UnsupportedError,
)
from opt_core.generation.config import GenerationConfig
from opt_core.generation.constraints import (
    Constraint,
    DisjunctiveConstraint,
    PhrasalConstraint,
)
from opt_core.generation.streaming import TextIteratorStreamer, TextStreamer
from opt_core.programs import clear_compiled, set_program_limit
from opt_core.tokenizer import OPTTokenizer

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Constraint",
    "DisjunctiveConstraint",
    "FormatError",
    "GenerationConfig",
    "HubError",
    "InputError",
    "OPTConfig",
    "OPTError",
    "OPTTokenizer",
    "PhrasalConstraint",
    "TextIteratorStreamer",
    "TextStreamer",
    "UnsupportedError",
    "clear_compiled",
    "set_program_limit",
]

# SPDX-License-Identifier: Apache-2.0
"""What is known of one option of generation: a row of the table that `GenerationConfig` is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from opt_core.generation.values import plain
from opt_core.validation import Check

# What an option may have no effect without.
SAMPLING = "do_sample=True"
BEAMS = "num_beams above 1"
CONTRASTIVE = "contrastive search (penalty_alpha, top_k, do_sample=False)"
ASSISTANT = "an assistant_model"
LOOKUP = "prompt_lookup_num_tokens"
RECORDS = "return_dict_in_generate=True"


@dataclasses.dataclass(frozen=True)
class Option:
    """A row: one option of generation.

    Attributes:
        default: the reference's.
        check: raises ConfigError about a value that the option cannot have.
        form: the form in which a list can be hashed.
        ids: the token ids in a value.
        purpose: what the option has no effect without.
        none_counts: whether None says something other than the default.
        foreign: values of later versions that a file may hold, which say how to compute, not what.
    """

    default: Any
    check: Check
    form: Callable[[Any], Any] = lambda value: value
    ids: Callable[[Any], Iterable[int]] = lambda value: ()
    purpose: str | None = None
    none_counts: bool = False
    foreign: tuple[str, ...] = ()

    def read(self, name: str, value: object) -> Any:
        """The value as it is kept; raises ConfigError for one that the option cannot have."""
        found = plain(value)
        if found is None and not self.none_counts:
            found = self.default
        self.check(name, found)
        return self.form(found)


def option(default: Any, check: Check, **rest: Any) -> Any:
    """A field of `GenerationConfig` with what is known of it; arguments as `Option`."""
    row = Option(default, check, **rest)
    return dataclasses.field(default=default, metadata={"option": row})

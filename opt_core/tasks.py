# SPDX-License-Identifier: Apache-2.0
"""What the heads for tasks decide alike in all frameworks: kinds of problems, and checks of labels."""

from __future__ import annotations

from enum import StrEnum

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.inputs import IGNORED_LABEL, Shape


class ProblemType(StrEnum):
    """What a classification head learns, by the names of `OPTConfig.problem_type`."""

    REGRESSION = "regression"
    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"


def problem_type(config: OPTConfig, labels_dtype: str) -> ProblemType:
    """The configuration's, or what labels of this dtype mean, which the configuration then remembers.

    One label is a regression, whole numbers are classes, other numbers say which classes hold
    (`modeling_opt.py:1315-1322` of the reference).

    Raises:
        InputError: a name that is none of `ProblemType`.
    """
    if config.problem_type is None:
        is_whole = "int" in labels_dtype
        if config.num_labels == 1:
            config.problem_type = ProblemType.REGRESSION.value
        else:
            found = ProblemType.SINGLE_LABEL if is_whole else ProblemType.MULTI_LABEL
            config.problem_type = found.value
    try:
        return ProblemType(config.problem_type)
    except ValueError as error:
        names = ", ".join(each.value for each in ProblemType)
        raise InputError(
            f"problem_type: expected one of {names}, found {config.problem_type!r}."
        ) from error


def check_class_labels(problem: ProblemType, labels: Shape, logits: Shape) -> None:
    """Raises InputError unless labels fit logits [B, num_labels]: [B] classes, or all as the logits.

    Classes, and the numbers of a regression with one label, may also be [B, 1].
    """
    batch, count = logits
    shapes: list[tuple[int | None, ...]] = [(batch, count)]
    if problem is ProblemType.SINGLE_LABEL or (problem is ProblemType.REGRESSION and count == 1):
        shapes = [(batch,), (batch, 1)]
    if not any(_fits(labels, shape) for shape in shapes):
        expected = " or ".join(map(str, shapes))
        raise InputError(
            f"labels: a {problem.value} with num_labels={count} expects the shape {expected}, found "
            f"{tuple(labels)}. Is problem_type the one you want?"
        )


def check_classes(smallest: int, largest: int, num_labels: int) -> None:
    """Raises InputError if labels are no classes; IGNORED_LABEL has been taken out."""
    if smallest < 0 or largest >= num_labels:
        raise InputError(
            f"labels holds the class {smallest if smallest < 0 else largest}, but the model has the "
            f"classes 0 to {num_labels - 1} (num_labels={num_labels}; {IGNORED_LABEL} does not count)."
        )


def check_poolable(config: OPTConfig, batch: int | None, *, from_ids: bool, legacy: bool) -> None:
    """Raises InputError where the last real token of each of several rows cannot be told."""
    if from_ids and not legacy and config.pad_token_id is None and batch not in (None, 1):
        raise InputError(
            "Cannot handle batch sizes > 1 if no padding token is defined: set config.pad_token_id, "
            "so that the last token of each row can be found."
        )


def check_span(start: Shape | None, end: Shape | None, batch: int | None) -> None:
    """Raises InputError unless both ends of the spans are given, each [B] or [B, 1]."""
    if (start is None) != (end is None):
        missing = "start_positions" if start is None else "end_positions"
        raise InputError(f"{missing} is missing: a span is learned from both of its ends.")
    for name, shape in (("start_positions", start), ("end_positions", end)):
        if shape is not None and not (_fits(shape, (batch,)) or _fits(shape, (batch, 1))):
            raise InputError(f"{name}: expected the shape {(batch,)}, found {tuple(shape)}.")


def _fits(found: Shape, expected: Shape) -> bool:
    return len(found) == len(expected) and all(
        f is None or e is None or f == e for f, e in zip(found, expected, strict=True)
    )

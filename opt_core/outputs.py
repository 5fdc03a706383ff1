# SPDX-License-Identifier: Apache-2.0
"""What the models return, in all three frameworks: dict, object and tuple at once.

The fields and their order are those of the reference's outputs; a field that was not computed is
absent from the dict and the tuple, and `None` as an attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar


class ModelOutput(dict[str, Any]):
    """A dict in the order of `FIELDS`, whose values can also be read by attribute or by position."""

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args: Any, **values: Any) -> None:
        given = dict(*args, **values)
        unknown = set(given) - set(self.FIELDS)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {min(unknown)!r}.")
        super().__init__({f: given[f] for f in self.FIELDS if given.get(f) is not None})

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in type(self).FIELDS:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}: {self.FIELDS}.")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).FIELDS:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}: {self.FIELDS}.")
        self[name] = value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)

    def to_tuple(self) -> tuple[Any, ...]:
        """The computed fields in order: what `return_dict=False` returns."""
        return tuple(self.values())


class BaseModelOutput(ModelOutput):
    FIELDS = ("last_hidden_state", "past_key_values", "hidden_states", "attentions")


class CausalLMOutput(ModelOutput):
    FIELDS = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


class SequenceClassifierOutput(ModelOutput):
    FIELDS = ("loss", "logits", "past_key_values", "hidden_states", "attentions")


class QuestionAnsweringOutput(ModelOutput):
    FIELDS = ("loss", "start_logits", "end_logits", "hidden_states", "attentions")


class GenerateOutput(ModelOutput):
    FIELDS = (
        "sequences",
        "sequences_scores",
        "scores",
        "logits",
        "beam_indices",
        "attentions",
        "hidden_states",
        "past_key_values",
    )


OUTPUTS = (
    BaseModelOutput,
    CausalLMOutput,
    SequenceClassifierOutput,
    QuestionAnsweringOutput,
    GenerateOutput,
)


def flatten(output: ModelOutput) -> tuple[list[Any], tuple[str, ...]]:
    """An output's values and field names, as the frameworks' tree utilities ask for."""
    return list(output.values()), tuple(output)


def unflatten(cls: type[ModelOutput], names: tuple[str, ...], values: Iterator[Any]) -> ModelOutput:
    """The inverse of `flatten`; values need not be arrays, and none of them is dropped."""
    output = cls()
    output.update(zip(names, values, strict=True))
    return output

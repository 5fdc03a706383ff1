# SPDX-License-Identifier: Apache-2.0
"""The heads for classification and for questions, against the reference's logits, losses, gradients."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import InputError
from opt_core.tasks import ProblemType
from tests.backends.base import Array, Backend
from tests.cases import GOLDEN, PADDINGS, case, write

MODELS = ("pre_norm", "post_norm", "untied_gelu")
CLASSIFICATION, QUESTIONS = "OPTForSequenceClassification", "OPTForQuestionAnswering"
PROBLEMS = {
    "single_label_classification": 3,
    "single_label_classification, ignored": 3,
    "multi_label_classification": 3,
    "regression": 1,
    "regression, several": 3,
}
SPANS = ("inside", "negative", "beyond")
CLASSES = "single_label_classification"
#: The column of each row's last token that is no pad; the reference takes the one before the first.
LAST = {"unpadded": [6, 6, 6], "left": [6, 6, 6], "right": [2, 6, 4], "mixed": [6, 3, 5]}
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def arrays(name: str) -> dict[str, Array]:
    with np.load(GOLDEN / "heads" / f"{name}.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def heads(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model by case, class, number of labels and problem type: loaded from a checkpoint of its own."""

    @cache
    def load(name: str, architecture: str, num_labels: int = 3, problem: str | None = None) -> Any:
        golden = case(name)
        kind = "span" if architecture == QUESTIONS else str(num_labels)
        start = f"weights/{kind}/"
        weights = {k: v for k, v in golden.weights.items() if k.startswith("model.")}
        found = {k.removeprefix(start): v for k, v in arrays(name).items() if k.startswith(start)}
        config = golden.config.replace(
            num_labels=num_labels, problem_type=problem, architectures=[architecture]
        )
        folder = write(tmp_path_factory.mktemp("head"), {**weights, **found}, config)
        return backend.load(folder, architecture=architecture)

    return load


def batch_of(name: str, start: str) -> dict[str, Array]:
    return {key: arrays(name)[f"{start}/{key}"] for key in ("input_ids", "attention_mask")}


def near(found: Any, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("situation", PADDINGS)
def test_the_last_token_that_is_no_pad_is_read(
    backend: Backend, heads: Any, name: str, situation: str
) -> None:
    """Of all tokens' logits; `legacy_pooling` gives the reference's, of the one before the first pad."""
    start = f"classification/{CLASSES}/{situation}"
    model, batch = heads(name, CLASSIFICATION, 3, CLASSES), batch_of(name, start)
    found = backend.forward(model, **batch)["logits"]
    near(found, arrays(name)[f"{start}/tokens"][np.arange(3), LAST[situation]])
    legacy = backend.forward(model, **batch, legacy_pooling=True)["logits"]
    near(legacy, arrays(name)[f"{start}/pooled"])


@every_model
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_of_each_problem(backend: Backend, heads: Any, name: str, problem: str) -> None:
    model = heads(name, CLASSIFICATION, PROBLEMS[problem], problem.split(",")[0])
    labels = arrays(name)[f"classification/{problem}/labels"]
    for situation in PADDINGS:
        start = f"classification/{problem}/{situation}"
        inputs = {**batch_of(name, start), "labels": labels, "legacy_pooling": True}
        near(backend.forward(model, **inputs)["loss"], arrays(name)[f"{start}/loss"])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients_of_classification(backend: Backend, heads: Any, problem: str) -> None:
    name, start = "post_norm", f"classification/{problem}/unpadded"
    model = heads(name, CLASSIFICATION, PROBLEMS[problem], problem.split(",")[0])
    labels = arrays(name)[f"classification/{problem}/labels"].astype(
        np.int64 if "single" in problem else np.float32
    )
    found = backend.gradients(model, **batch_of(name, start), labels=labels, compiled=True)
    for parameter in ("score.weight", "model.decoder.layers.0.fc1.weight"):
        near(found[parameter], arrays(name)[f"{start}/gradient/{parameter}"])


@pytest.mark.parametrize(
    ("num_labels", "labels", "expected"),
    [
        (1, np.array([0.5, 1.0, 2.0], np.float32), ProblemType.REGRESSION),
        (3, np.array([0, 1, 2]), ProblemType.SINGLE_LABEL),
        (3, np.eye(3, dtype=np.float32), ProblemType.MULTI_LABEL),
    ],
)
def test_the_problem_is_told_by_the_labels_and_remembered(
    backend: Backend, heads: Any, num_labels: int, labels: Array, expected: ProblemType
) -> None:
    model, name = heads("pre_norm", CLASSIFICATION, num_labels), "pre_norm"
    backend.config(model).problem_type = None
    batch = batch_of(name, f"classification/{CLASSES}/left")
    found = backend.forward(model, **batch, labels=labels)["loss"]
    assert backend.config(model).problem_type == expected
    explicit = heads(name, CLASSIFICATION, num_labels, expected.value)
    near(found, backend.forward(explicit, **batch, labels=labels)["loss"])


@every_model
@pytest.mark.parametrize("situation", PADDINGS)
def test_answers(backend: Backend, heads: Any, name: str, situation: str) -> None:
    model, start = heads(name, QUESTIONS), f"questions/{situation}"
    batch, golden = batch_of(name, start), arrays(name)
    for span in SPANS:
        ends = dict(zip(("start_positions", "end_positions"), golden[f"spans/{span}"], strict=True))
        found = backend.forward(model, **batch, **ends)
        near(found["loss"], golden[f"{start}/loss/{span}"])
        real = batch["attention_mask"] == 1
        for logits in ("start_logits", "end_logits"):
            near(found[logits][real], golden[f"{start}/{logits}"][real])


@pytest.mark.parametrize("span", SPANS)
def test_gradients_of_answers(backend: Backend, heads: Any, span: str) -> None:
    name, start = "pre_norm", "questions/right"
    golden = arrays(name)
    ends = dict(zip(("start_positions", "end_positions"), golden[f"spans/{span}"], strict=True))
    inputs = {**batch_of(name, start), **ends}
    found = backend.gradients(heads(name, QUESTIONS), **inputs, compiled=True)
    for parameter in ("qa_outputs.weight", "qa_outputs.bias", "model.decoder.layers.0.fc1.weight"):
        near(found[parameter], golden[f"{start}/gradient/{span}/{parameter}"])


def test_embeddings_end_where_their_mask_does(backend: Backend, heads: Any) -> None:
    """Without a mask, with their last column."""
    name = "pre_norm"
    start = f"classification/{CLASSES}/right"
    model, batch = heads(name, CLASSIFICATION, 3, CLASSES), batch_of(name, start)
    expected = backend.forward(model, **batch)["logits"]
    table = case(name).weights["model.decoder.embed_tokens.weight"]
    batch["inputs_embeds"] = table[batch.pop("input_ids")]
    near(backend.forward(model, **batch)["logits"], expected)
    short = {"inputs_embeds": batch["inputs_embeds"][:1, :3]}
    near(backend.forward(model, **short)["logits"], expected[:1])


@pytest.mark.filterwarnings("ignore:attn_implementation=")
@pytest.mark.parametrize("architecture", [CLASSIFICATION, QUESTIONS])
def test_tuples_hold_what_was_computed(backend: Backend, heads: Any, architecture: str) -> None:
    """Also the hidden states of a model for questions, which the reference loses without a cache."""
    model = heads("pre_norm", architecture)
    batch = batch_of("pre_norm", "questions/left")
    flags = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    named = backend.forward(model, **batch, **flags)
    logits = ["logits"] if architecture == CLASSIFICATION else ["start_logits", "end_logits"]
    assert [key for key in named if key != "raw"] == [*logits, "hidden_states", "attentions"]
    plain = backend.forward(model, **batch, **flags, return_dict=False)["tuple"]
    assert len(plain) == len(logits) + 2


@pytest.mark.parametrize("architecture", [CLASSIFICATION, QUESTIONS])
def test_heads_are_saved_and_loaded(
    backend: Backend, heads: Any, tmp_path: Path, architecture: str
) -> None:
    model = heads("post_norm", architecture)
    backend.save(model, tmp_path)
    again = backend.load(tmp_path, architecture=architecture)
    before, after = (backend.canonical_weights(each) for each in (model, again))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert backend.config(again).architectures == (architecture,)


@pytest.mark.parametrize("architecture", [CLASSIFICATION, QUESTIONS])
def test_a_checkpoint_without_the_head_gets_a_fresh_one(
    backend: Backend, architecture: str
) -> None:
    """The user is told, and the rest is the checkpoint's."""
    with pytest.warns(UserWarning, match="score|qa_outputs"):
        model = backend.load(case("pre_norm").folder, architecture=architecture)
    found = backend.canonical_weights(model)
    added = found.keys() - case("pre_norm").weights.keys()
    assert added in ({"score.weight"}, {"qa_outputs.weight", "qa_outputs.bias"})
    head = found[min(added, key=lambda name: "bias" in name)]
    assert 0 < head.std() < 5 * backend.config(model).init_std
    assert all(np.array_equal(found[k], v) for k, v in case("pre_norm").weights.items())


BAD = {
    "a class too high": ({"labels": np.array([0, 3, 1])}, "the classes 0 to 2"),
    "a class below": ({"labels": np.array([0, -1, 1])}, "holds the class -1"),
    "too few labels": ({"labels": np.array([0, 1])}, r"expects the shape \(3,\)"),
    "labels of tokens": ({"labels": np.zeros((3, 7), np.int64)}, r"found \(3, 7\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_labels(backend: Backend, heads: Any, what: str) -> None:
    inputs, message = BAD[what]
    model = heads("pre_norm", CLASSIFICATION, 3, CLASSES)
    batch = batch_of("pre_norm", f"classification/{CLASSES}/left")
    with pytest.raises(InputError, match=message):
        backend.forward(model, **batch, **inputs)


def test_an_unknown_problem(backend: Backend, heads: Any) -> None:
    model = heads("pre_norm", CLASSIFICATION, 3, "ranking")
    with pytest.raises(InputError, match="expected one of regression, single_label"):
        backend.forward(model, input_ids=np.array([[5, 6]]), labels=np.array([1]))


def test_rows_whose_ends_cannot_be_told(backend: Backend, heads: Any) -> None:
    """Without a pad token, one row has its end at its last column; several have none."""
    model = heads("post_norm", CLASSIFICATION, 1)
    config = backend.config(model)
    ids, pad = np.array([[5, 6], [7, 8]]), config.pad_token_id
    expected = backend.forward(model, input_ids=ids)["logits"]
    config.pad_token_id = None
    try:
        with pytest.raises(InputError, match="no padding token"):
            backend.forward(model, input_ids=ids)
        near(backend.forward(model, input_ids=ids[:1])["logits"], expected[:1])
        near(backend.forward(model, input_ids=ids, legacy_pooling=True)["logits"], expected)
    finally:
        config.pad_token_id = pad


def test_half_a_span(backend: Backend, heads: Any) -> None:
    model = heads("pre_norm", QUESTIONS)
    with pytest.raises(InputError, match="end_positions is missing"):
        backend.forward(model, input_ids=np.array([[5, 6]]), start_positions=np.array([1]))
    with pytest.raises(InputError, match=r"start_positions: expected the shape \(1,\)"):
        backend.forward(
            model,
            input_ids=np.array([[5, 6]]),
            start_positions=np.array([[1, 0]]),
            end_positions=np.array([1]),
        )

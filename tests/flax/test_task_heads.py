# SPDX-License-Identifier: Apache-2.0
"""Heads for tasks while a transformation traces them, where no label can be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_core import InputError, OPTConfig
from opt_core.tasks import ProblemType
from opt_flax import FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification
from opt_flax.losses import cross_entropy

CONFIG = OPTConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=32,
    max_position_embeddings=16,
    dropout=0.0,
    num_labels=3,
)
IDS = jnp.array([[5, 6, 7], [8, 9, 1]])
PROBLEMS = {
    ProblemType.REGRESSION: (1, jnp.array([0.5, 1.0])),
    ProblemType.SINGLE_LABEL: (3, jnp.array([0, 2])),
    ProblemType.MULTI_LABEL: (3, jnp.eye(3)[:2]),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_problem_is_told_while_tracing(problem):
    """By the dtype alone, and remembered; a module that is traced itself tells it too."""
    num_labels, labels = PROBLEMS[problem]
    model = FlaxOPTForSequenceClassification(CONFIG.replace(num_labels=num_labels))
    call = jax.jit(jax.value_and_grad(lambda p, x: model(IDS, params=p, labels=x).loss))
    loss, gradient = call(model.params, labels)
    assert model.config.problem_type == problem
    assert float(loss) == pytest.approx(float(model(IDS, labels=labels).loss), rel=1e-5)
    assert jnp.abs(gradient["score"]["kernel"]).max() > 0
    twin = FlaxOPTForSequenceClassification(CONFIG.replace(num_labels=num_labels), _do_init=False)
    apply = jax.jit(twin.module.apply)
    for _ in range(2):
        found = apply({"params": model.params}, IDS, labels=labels).loss
        assert float(found) == pytest.approx(float(loss), rel=1e-5)
    assert twin.config.problem_type == problem


def test_shapes_are_checked_while_tracing():
    model = FlaxOPTForSequenceClassification(CONFIG)
    call = jax.jit(lambda labels: model(IDS, labels=labels).loss)
    with pytest.raises(InputError, match=r"expects the shape \(2,\)"):
        call(jnp.zeros((2, 3), int))


def test_classes_that_are_none_show_in_the_loss():
    """They cannot be refused there; -1 would else be the last class."""
    logits = jnp.array([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]])
    loss = jax.jit(jax.value_and_grad(cross_entropy))
    for labels in ([0, 3], [0, -1], [-7, 2]):
        assert np.isnan(loss(logits, jnp.array(labels))[0])
    value, gradient = loss(logits, jnp.array([2, -100]))
    expected = cross_entropy(logits[:1], jnp.array([2], jnp.uint8))
    assert float(value) == pytest.approx(float(expected))
    assert np.isfinite(gradient).all() and not gradient[1].any()


def test_a_span_learns_in_a_compiled_step():
    model = FlaxOPTForQuestionAnswering(CONFIG)
    start, end = jnp.array([0, 5]), jnp.array([[1], [-1]])

    @jax.jit
    def step(params):
        def loss(params):
            return model(IDS, params=params, start_positions=start, end_positions=end).loss

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda x, g: x - 0.5 * g, params, gradient)

    params, losses = model.params, []
    for _ in range(5):
        loss, params = step(params)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]

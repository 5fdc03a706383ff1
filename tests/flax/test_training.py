# SPDX-License-Identifier: Apache-2.0
"""Training as in the reference's own example scripts, which could not train FlaxOPT."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from opt_core import InputError, OPTConfig
from opt_flax import FlaxOPTForCausalLM

TINY = OPTConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=64,
    max_position_embeddings=32,
)


def tiny(**changes):
    return FlaxOPTForCausalLM(TINY.replace(**changes))


@pytest.fixture
def batch():
    ids = jax.random.randint(jax.random.key(0), (4, 12), 3, 50)
    mask = jnp.ones_like(ids).at[0, 8:].set(0)
    return {"input_ids": ids, "attention_mask": mask, "labels": jnp.where(mask == 1, ids, -100)}


def test_a_jitted_optax_step_learns(batch):
    """As run_clm_flax.py: labels apart, `model(**batch, params=..., dropout_rng=..., train=True)`."""
    model = tiny()
    state = TrainState.create(apply_fn=model.__call__, params=model.params, tx=optax.adam(5e-3))

    @jax.jit
    def train_step(state, batch, rng):
        def compute_loss(params):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            logits = state.apply_fn(**inputs, params=params, dropout_rng=rng, train=True)[0]
            labels = batch["labels"][:, 1:]
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits[:, :-1].astype(jnp.float32), jnp.maximum(labels, 0)
            )
            return (losses * (labels != -100)).sum() / (labels != -100).sum()

        loss, gradient = jax.value_and_grad(compute_loss)(state.params)
        return state.apply_gradients(grads=gradient), loss

    before = model(**batch).loss
    for step in range(40):
        state, loss = train_step(state, batch, jax.random.key(step))
    after = model(**batch, params=state.params).loss
    assert before == pytest.approx(np.log(50), abs=0.2)
    assert loss < before / 2 and after < before / 4
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


def test_labels_give_the_same_loss_as_the_script(batch):
    model = tiny()
    labels, logits = batch["labels"][:, 1:], model(**batch).logits[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    expected = losses[labels != -100].mean()
    assert model(**batch).loss == pytest.approx(float(expected), rel=1e-6)
    assert np.isnan(model(**{**batch, "labels": jnp.full((4, 12), -100)}).loss)


@pytest.mark.parametrize("labels", [[[5, 50]], [[5, -1]], [[5, 6, 7]]])
def test_labels_are_checked(labels):
    with pytest.raises(InputError, match="labels"):
        tiny()([[5, 6]], labels=labels)


def test_train_and_deterministic_say_the_same(batch):
    model, ids = tiny(), batch["input_ids"]
    rng = jax.random.key(1)
    quiet = model(ids).logits
    first = model(ids, dropout_rng=rng, train=True).logits
    np.testing.assert_array_equal(first, model(ids, dropout_rng=rng, deterministic=False).logits)
    assert (first != quiet).any()
    assert (first != model(ids, dropout_rng=jax.random.key(2), train=True).logits).any()
    calm = model(ids, dropout_rng=rng, train=False, deterministic=False).logits
    np.testing.assert_array_equal(calm, quiet)


def test_training_with_dropout_needs_a_key(batch):
    with pytest.raises(InputError, match="dropout_rng"):
        tiny()(**batch, train=True)
    model = tiny(dropout=0.0)
    np.testing.assert_array_equal(model(**batch, train=True).logits, model(**batch).logits)


@pytest.mark.filterwarnings("ignore:attn_implementation=")
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attention_dropout(batch, kernel):
    config = TINY.replace(dropout=0.0, attention_dropout=0.5)
    model = FlaxOPTForCausalLM(config, attn_implementation=kernel)
    rng = jax.random.key(1)
    assert (model(**batch, dropout_rng=rng, train=True).logits != model(**batch).logits).any()


def test_layerdrop_drops_whole_layers(batch):
    """With layerdrop=1 nothing is left but embeddings and the final norm; each layer has its draw."""
    ids = batch["input_ids"]
    every = tiny(dropout=0.0, layerdrop=1.0)
    call = jax.jit(
        lambda rng: every(ids, dropout_rng=rng, train=True, output_hidden_states=True).hidden_states
    )
    first, second, _ = call(jax.random.key(0))
    np.testing.assert_array_equal(first, second)

    some = tiny(dropout=0.0, layerdrop=0.5)

    @jax.jit
    def draw(rng):
        output = some(ids, dropout_rng=rng, train=True, output_hidden_states=True)
        return output.hidden_states, output.logits

    whole, seen = some(ids).logits, set()
    for seed in range(24):
        states, logits = draw(jax.random.key(seed))
        first_dropped = bool((states[0] == states[1]).all())
        seen.add((first_dropped, bool(jnp.allclose(logits, whole, atol=1e-5))))
    assert seen == {(True, False), (False, True), (False, False)}
    np.testing.assert_array_equal(some(ids).logits, some(ids, train=False).logits)
    options = {"labels": ids, "dropout_rng": jax.random.key(0), "train": True}
    slope = jax.jit(jax.grad(lambda params: every(ids, params=params, **options).loss))
    gradient = slope(every.params)
    assert not any(x.any() for x in jax.tree.leaves(gradient["model"]["decoder"]["layers"]))

# SPDX-License-Identifier: Apache-2.0
"""What only compiled TensorFlow can get wrong."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from opt_core import InputError
from opt_core.generation.plan import BUCKET
from opt_core.programs import DEFAULT_LIMIT, set_program_limit
from opt_tf import KVCache
from opt_tf.generation import programs
from tests.tf.tiny import CONFIG, TASK, tiny
from tests.tolerances import assert_close

ROOMY = CONFIG.replace(max_position_embeddings=40)
jits = pytest.mark.parametrize("jit_compile", [False, True])
STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 2},
}


@jits
def test_ids_outside_the_vocabulary_give_nan(model, golden, jit_compile):
    """Compiled code cannot raise; it must not answer for another token either."""
    ids = golden.inputs("unpadded")["input_ids"].copy()
    ids[0, 3] = -1
    if jit_compile:  # a graph on CPU refuses these by itself
        ids[1, 5] = 999
    compiled = tf.function(lambda ids: model(ids).logits, jit_compile=jit_compile)
    bad = np.isnan(compiled(tf.constant(ids)).numpy()).any(axis=(1, 2))
    assert bad.tolist() == [True, jit_compile, False]


def test_positions_past_the_table_give_nan(model, golden):
    ids = tf.constant(golden.inputs("unpadded")["input_ids"])
    compiled = tf.function(lambda ids, p: model(ids, position_ids=p).logits, jit_compile=True)
    positions = tf.range(7)[None] + tf.constant([0, 10**6, 0])[:, None]
    bad = np.isnan(compiled(ids, positions).numpy()).any(axis=(1, 2))
    assert bad.tolist() == [False, True, False]


@jits
@pytest.mark.parametrize("masked", [False, True])
def test_a_fixed_cache_through_a_function_traced_once(model, golden, jit_compile, masked):
    """The length is data: ten steps, one compilation, and the logits of a single call."""
    ids = tf.constant(golden.inputs("unpadded")["input_ids"], tf.int32)
    mask = tf.ones((3, 9), tf.int32) if masked else None
    step = tf.function(
        lambda ids, cache: model(ids, attention_mask=mask, past_key_values=cache),
        jit_compile=jit_compile,
    )
    cache = model.init_cache(3, 9)
    cache = KVCache(cache.layers, tf.constant(0))
    found = []
    for column in range(7):
        output = step(ids[:, column : column + 1], cache)
        cache = output.past_key_values
        found.append(output.logits)
    assert step.experimental_get_tracing_count() == 1
    assert int(cache.length) == 7
    assert cache[0][0].shape == (3, 4, 7, 6)
    assert_close(tf.concat(found, 1).numpy(), golden.outputs("unpadded")["logits"], "logits")


def test_a_cache_through_a_while_loop(model, golden):
    ids = tf.constant(golden.inputs("unpadded")["input_ids"], tf.int32)

    @tf.function(jit_compile=True)
    def run():
        def body(cache, logits):
            output = model(tf.slice(ids, (0, cache.length), (3, 1)), past_key_values=cache)
            return output.past_key_values, output.logits

        start = KVCache(model.init_cache(3, 7).layers, tf.constant(0))
        first = tf.zeros((3, 1, model.config.vocab_size))
        return tf.while_loop(lambda cache, _: cache.length < 7, body, (start, first))

    expected = golden.outputs("unpadded")["logits"][:, -1:]
    assert_close(run()[1].numpy(), expected, "logits")


@jits
def test_unknown_shapes(model, inputs, logits, real, jit_compile):
    spec = tf.TensorSpec((None, None), tf.int32)
    compiled = tf.function(
        lambda ids, mask: model(ids, attention_mask=mask).logits,
        input_signature=[spec, spec],
        jit_compile=jit_compile,
    )
    found = compiled(inputs["input_ids"], inputs["attention_mask"]).numpy()
    assert_close(found[real], logits[real], "logits")
    assert compiled(inputs["input_ids"][:, :1], inputs["attention_mask"][:, 2:3]).shape[1] == 1


@pytest.mark.parametrize("dims", [(None, 2, None, 8), (None, None, None, None)])
def test_a_past_of_unknown_shape(dims):
    model = tiny(config=ROOMY)
    ids = tf.constant([[3, 4, 5, 6], [7, 8, 9, 10]])
    pair = (tf.TensorSpec(dims), tf.TensorSpec(dims))
    spec = tf.TensorSpec((None, None), tf.int32)

    @tf.function(input_signature=[spec, (pair,) * ROOMY.num_hidden_layers])
    def step(ids, past):
        return model(ids, past_key_values=past).logits

    past = tuple(model(ids[:, :3], use_cache=True).past_key_values)
    assert_close(step(ids[:, 3:], past).numpy(), model(ids).logits[:, 3:].numpy(), "logits")


def test_what_is_known_of_a_past_is_checked_while_tracing():
    model = tiny(config=ROOMY)
    fits, other = tf.TensorSpec((None, 2, None, 8)), tf.TensorSpec((None, None, None, 4))
    past = ((fits, other),) * ROOMY.num_hidden_layers
    step = tf.function(lambda ids, past: model(ids, past_key_values=past).logits, autograph=False)
    with pytest.raises(InputError, match="value of layer 0.*8 numbers a head; found .*4"):
        step.get_concrete_function(tf.TensorSpec((None, None), tf.int32), past)


@jits
def test_dropout_and_layerdrop_differ_from_call_to_call(jit_compile):
    rates = {"layerdrop": 0.5, "dropout": 0.3, "attention_dropout": 0.2}
    model = tiny(config=CONFIG.replace(num_hidden_layers=3, **rates))
    compiled = tf.function(lambda ids: model(ids, training=True).logits, jit_compile=jit_compile)
    ids = tf.constant([[5, 6, 7, 8]])
    first, second = compiled(ids), compiled(ids)
    assert np.isfinite(first).all()
    assert not np.array_equal(first, second)


def test_gradients_in_eager_graph_and_xla():
    model = tiny()

    def gradients():
        with tf.GradientTape() as tape:
            loss = model(TASK).loss
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, model.trainable_weights)]

    eager = gradients()
    for jit_compile in (False, True):
        compiled = tf.function(gradients, jit_compile=jit_compile)()
        for found, expected, weight in zip(compiled, eager, model.trainable_weights, strict=True):
            # Biases of keys have no gradient but rounding errors.
            scale = max(1e-3, float(tf.reduce_max(tf.abs(expected))))
            assert np.abs(found - expected).max() <= 1e-4 * scale, weight.path


def traces(model):
    """How often each compiled function of `generate` was traced."""
    return [program.function.experimental_get_tracing_count() for program in model.programs]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lengths_and_paddings_share_a_compilation(strategy):
    """Prompt lengths and numbers of new tokens in the same buckets, padded on either side or not."""
    model = tiny(config=ROOMY)
    options = {**STRATEGIES[strategy], "eos_token_id": None}
    row = list(range(3, 13))
    for length, count, left, right in ((2, 3, 0, 0), (5, 3, 1, 0), (9, 4, 0, 1), (9, 17, 0, 0)):
        ids = [[1] * left + row[:length] + [1] * right]
        model.generate(ids, max_new_tokens=count, **options)
    assert traces(model) == [1]


def test_numbers_share_a_compilation():
    """Another temperature, or another shortest length, is told to the same program."""
    model = tiny(config=ROOMY)
    sampling = {"do_sample": True, "seed": 3, "max_new_tokens": 8, "eos_token_id": 2}
    drawn = {
        tuple(
            model.generate(
                [[4, 5, 6]],
                temperature=0.5 + count,
                top_p=0.99 - 0.1 * count,
                repetition_penalty=1.1 + count,
                min_new_tokens=1 + count,
                **sampling,
            )
            .numpy()[0]
            .tolist()
        )
        for count in range(3)
    }
    assert traces(model) == [1] and len(drawn) > 1


def test_steps_that_someone_watches_share_two_compilations():
    """One of the prompts, one of a token; where the loop runs on the host."""
    model = tiny(config=ROOMY)
    for length, count in ((2, 3), (5, 4)):
        ids = [list(range(3, 3 + length))]
        options = {"stopping_criteria": [lambda tokens, scores: False], "eos_token_id": None}
        model.generate(ids, max_new_tokens=count, **options)
    assert sum(traces(model)) == 2


def test_prompts_longer_than_the_room_for_their_bucket():
    """A prompt may fill the position table up to the last new token."""
    size = ROOMY.max_position_embeddings
    assert size % BUCKET, "the bucket would fit"
    model = tiny(config=ROOMY)
    ids = np.arange(size - 1)[None] % 50 + 3
    assert model.generate(ids, max_new_tokens=2, eos_token_id=None).shape == (1, size + 1)


def test_where_nothing_can_be_forgotten_programs_run_without_xla(monkeypatch):
    """The fallback for a TensorFlow in which what holds XLA's programs has another name."""
    model = tiny()
    prompts = [[[5, 6, 7]] * rows for rows in (1, 2, 3)]
    expected = [model.generate(ids, max_new_tokens=3).numpy() for ids in prompts]
    monkeypatch.setattr(programs, "_forget", lambda: False)
    model.clear_compiled()
    set_program_limit(1)
    try:
        with pytest.warns(UserWarning, match="run without XLA"):
            found = [model.generate(ids, max_new_tokens=3).numpy() for ids in prompts]
    finally:
        set_program_limit(DEFAULT_LIMIT)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other)

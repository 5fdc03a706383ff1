# SPDX-License-Identifier: Apache-2.0
"""A call is a pure function of its arguments: jit, grad, vmap and compiled steps over a cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opt_core import InputError, UnsupportedError
from opt_flax import FlaxOPTForCausalLM, KVCache
from tests.backends.base import CPU_KERNELS
from tests.cases import GOLDEN

CASES = ("post_norm", pytest.param("untied_gelu", marks=pytest.mark.slow))


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> FlaxOPTForCausalLM:
    return FlaxOPTForCausalLM.from_pretrained(GOLDEN / "cases" / request.param)


one_model = pytest.mark.parametrize("model", CASES[:1], indirect=True)


@pytest.fixture(scope="module")
def ids(model: FlaxOPTForCausalLM) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, 7), 3, model.config.vocab_size)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_jit_gives_the_same(model, ids):
    mask = jnp.ones_like(ids).at[0, :3].set(0)
    expected = model(ids, mask).logits[mask == 1]
    found = jax.jit(lambda p, i, m: model(i, m, params=p).logits)(model.params, ids, mask)
    close(found[mask == 1], expected)
    found = jax.jit(model.module.apply)({"params": model.params}, ids, mask).logits
    close(found[mask == 1], expected)


def test_a_compiled_call_returns_its_output_object(model, ids):
    call = jax.jit(lambda p, i: model(i, params=p, use_cache=True, output_hidden_states=True))
    output = call(model.params, ids)
    assert list(output) == ["logits", "past_key_values", "hidden_states"]
    assert isinstance(output.past_key_values, KVCache) and output.past_key_values.length is None


@one_model
def test_vmap_over_batches(model, ids):
    found = jax.jit(jax.vmap(lambda i: model(i).logits))(ids[:, None])
    close(found[:, 0], model(ids).logits)


@one_model
def test_vmap_over_parameters(model, ids):
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), model.params)
    found = jax.jit(jax.vmap(lambda p: model(ids, params=p).logits))(both)
    close(found[0], model(ids).logits)
    expected = model(ids, params=jax.tree.map(lambda x: 2 * x, model.params)).logits
    assert jnp.abs(found[1] - expected).max() <= 2e-6 * jnp.abs(expected).max()  # some forty


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_gradient_is_the_slope(model, ids, kernel):
    """Against a difference quotient along one direction in the space of all parameters."""
    other = FlaxOPTForCausalLM(model.config, _do_init=False, attn_implementation=kernel)
    loss = jax.jit(lambda p: other(ids, params=p, labels=ids).loss)
    random, params = np.random.default_rng(0), jax.tree.map(np.asarray, model.params)
    direction = jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), params)
    gradient = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))
    products = jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)
    slope = sum(jax.tree.leaves(products))
    step = np.float32(1e-3)
    ahead = loss(jax.tree.map(lambda p, d: p + step * d, params, direction))
    behind = loss(jax.tree.map(lambda p, d: p - step * d, params, direction))
    assert float(slope) == pytest.approx(
        float(ahead - behind) / (2 * float(step)), rel=0.02, abs=0.02
    )


@pytest.mark.parametrize("masked", [True, False])
def test_one_compiled_step_serves_all_lengths(model, ids, masked):
    """A fixed cache keeps its shapes; its length is data."""
    traces = []

    @jax.jit
    def step(params: Any, token: jax.Array, mask: Any, cache: KVCache) -> Any:
        traces.append(token.shape)
        output = model(token, mask, params=params, past_key_values=cache)
        return output.logits, output.past_key_values

    mask = jnp.ones((2, 12), int).at[1, :2].set(0) if masked else None
    cache, found = model.init_cache(2, 12), []
    for column in range(ids.shape[1]):
        logits, cache = step(model.params, ids[:, column : column + 1], mask, cache)
        found.append(logits)
    assert len(traces) == 1 and int(cache.length) == 7
    real = slice(2, None) if masked else slice(None)
    expected = model(ids, None if mask is None else mask[:, :7]).logits
    close(jnp.concatenate(found, axis=1)[:, real], expected[:, real])


def test_init_cache_draws_nothing(model):
    """The reference ran a whole random initialisation for the cache's shapes."""
    cache = jax.eval_shape(lambda: model.init_cache(3, 10))
    config = model.config
    shape = (3, config.num_attention_heads, 10, config.head_dim)
    assert [x.shape for x in jax.tree.leaves(cache.layers)] == [shape] * 2 * len(cache)
    empty = model.init_cache(3, 10)
    assert int(empty.length) == 0 and empty.length.dtype == jnp.int32
    assert not any(leaf.any() for leaf in jax.tree.leaves(empty))


@one_model
def test_a_second_generate_compiles_nothing(model, ids):
    first = model.generate(ids, max_new_tokens=4, eos_token_id=None).sequences
    compiled = len(model.programs)
    twin = FlaxOPTForCausalLM(model.config, _do_init=False)
    second = twin.generate(ids, params=model.params, max_new_tokens=4, eos_token_id=None).sequences
    assert len(model.programs) == compiled
    assert first.dtype == jnp.int32 and (first == second).all()


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 2},
}


@one_model
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lengths_and_paddings_share_a_compilation(model, strategy):
    """Prompt lengths and numbers of new tokens in the same buckets, padded on either side or not."""
    options = {**STRATEGIES[strategy], "eos_token_id": None}
    row = list(range(3, 13))
    sizes = set()
    for length, count, left, right in ((2, 3, 0, 0), (5, 3, 1, 0), (9, 4, 0, 1), (9, 17, 0, 0)):
        prompt = [[1] * left + row[:length] + [1] * right]
        model.generate(prompt, max_new_tokens=count, **options)
        sizes.add(len(model.programs))
    assert len(sizes) == 1


@one_model
def test_generate_inside_another_jit(model, ids):
    """There is no trimming there: rows that end early are filled up."""
    outside = model.generate(ids, max_new_tokens=5).sequences
    token = int(outside[0, 7])  # ends the first row at once, and perhaps the second
    expected = model.generate(ids[:1], max_new_tokens=5, eos_token_id=token).sequences
    assert expected.shape == (1, 8)
    found = jax.jit(
        lambda p, i: model.generate(i, params=p, max_new_tokens=5, eos_token_id=token).sequences
    )(model.params, ids[:1])
    assert found.tolist() == [[*expected[0].tolist(), 1, 1, 1, 1]]


@one_model
@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 2}, {"return_dict_in_generate": True}]
)
def test_nothing_of_the_host_runs_inside_another_jit(model, ids, options):
    with pytest.raises(UnsupportedError, match="Inside jax.jit"):
        jax.jit(lambda i: model.generate(i, max_new_tokens=2, **options).sequences)(ids[:1])


@one_model
def test_generate_draws_from_a_key_or_a_seed(model, ids):
    options = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
    seeded = model.generate(ids, seed=3, **options).sequences
    keyed = model.generate(ids, prng_key=jax.random.key(3), **options).sequences
    assert (seeded == keyed).all()
    assert (seeded != model.generate(ids, seed=4, **options).sequences).any()
    assert (seeded != model.generate(ids, **options).sequences).any()
    with pytest.raises(InputError, match="seed or prng_key"):
        model.generate(ids, seed=3, prng_key=jax.random.key(3), **options)


def test_shapes_are_checked_while_tracing(model, ids):
    with pytest.raises(InputError, match="mask has length 6"):
        jax.jit(model)(ids, jnp.ones((2, 6)))
    with pytest.raises(InputError, match="max_position_embeddings"):
        jax.jit(model)(jnp.ones((1, 41), int))
    step = jax.jit(lambda cache, mask: model([[5]], mask, past_key_values=cache).logits)
    with pytest.raises(InputError, match="room for only 8"):
        step(model.init_cache(1, 8), jnp.ones((1, 9)))
    with pytest.raises(InputError, match="past_key_values, key of layer 0"):
        step(model.init_cache(2, 8), jnp.ones((1, 8)))


WIDE = 2**32 + 1  # of whose bits JAX keeps 32: 1


@one_model
@pytest.mark.parametrize(
    "rows", [[[3, WIDE]], np.array([[3, WIDE]]), np.array([[3, WIDE]], np.uint64)]
)
@pytest.mark.parametrize("name", ["attention_mask", "input_ids", "labels", "position_ids"])
def test_no_number_is_cut_to_32_bits(model, name, rows):
    """Where the values are known, inside a transformation too."""
    with pytest.raises(InputError, match=f"{name} holds {WIDE}"):
        model(**{"input_ids": [[3, 4]], name: rows})
    with pytest.raises(InputError, match=f"{name} holds {WIDE}"):
        jax.jit(lambda params: model(**{"input_ids": [[3, 4]], name: rows}, params=params).logits)(
            model.params
        )


@one_model
@pytest.mark.parametrize("rows", [[[2**70, 3]], [["a", "b"]], [[3], [4, 5]], [[None, 3]]])
def test_rows_that_are_no_numbers(model, rows):
    with pytest.raises(InputError, match="input_ids"):
        model(rows)


@one_model
def test_no_prompt_is_cut_where_only_its_mask_is_traced(model):
    def run(mask):
        return model.generate([[3, WIDE]], attention_mask=mask, max_new_tokens=2).sequences

    with pytest.raises(InputError, match=f"input_ids holds {WIDE}"):
        jax.jit(run)(jnp.ones((1, 2), int))


@one_model
def test_generate_inside_another_jit_needs_the_length_of_a_past(model, ids):
    options = {"max_new_tokens": 2, "pad_token_id": 1, "eos_token_id": None}
    past = model(ids[:, :4], use_cache=True).past_key_values
    run = jax.jit(lambda past: model.generate(ids, past_key_values=past, **options).sequences)
    assert run(past).tolist() == model.generate(ids, **options).sequences.tolist()
    with pytest.raises(InputError, match="how many tokens it holds must be known"):
        run(model.init_cache(2, 9))


@one_model
def test_numbers_share_a_compilation(model):
    """Another temperature, or another shortest length, is told to the same program."""
    sampling = {"do_sample": True, "seed": 3, "max_new_tokens": 8, "eos_token_id": 2}
    sizes, drawn = set(), set()
    for count in range(3):
        found = model.generate(
            [[4, 5, 6]],
            temperature=0.5 + count,
            top_p=0.99 - 0.1 * count,
            repetition_penalty=1.1 + count,
            min_new_tokens=1 + count,
            **sampling,
        )
        sizes.add(len(model.programs))
        drawn.add(tuple(found.sequences[0].tolist()))
    assert len(sizes) == 1 and len(drawn) > 1

"""A block from a compressed copy, its top k neurons exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.encodings import Blocks, Float, Nested
from hire_rewrite.ops.ffn.tail import (
    dense_predicted_ffn,
    hire_predicted_ffn,
    measured_predicted_ffn,
)
from hire_rewrite.ops.quality import quality
from tests.cases import optimized
from tests.ops.cases import normal, predicted_ffn


def relu(pre, vectors):
    return jax.nn.relu(pre[0])


def biased_relu(pre, vectors):
    return jax.nn.relu(pre[0] + vectors[0])


def swiglu(pre, vectors):
    return jax.nn.silu(pre[0]) * pre[1]


def biased_swiglu(pre, vectors):
    return jax.nn.silu(pre[0] + vectors[0]) * (pre[1] * vectors[1])


BLOCKS = {
    "relu": (relu, {"projections": 1}),
    "biased relu": (biased_relu, {"projections": 1, "vectors": 1}),
    "swiglu": (swiglu, {}),
    "biased swiglu": (biased_swiglu, {"vectors": 2}),
    "groups": (biased_swiglu, {"vectors": 2, "group": 4, "k_groups": 4}),
    "by |h|": (swiglu, {"criterion": "hidden"}),
    "4 bits": (swiglu, {"encoding": Blocks(4), "exact": Blocks(8, None, scale="float32")}),
    "a row each, minimum": (swiglu, {"encoding": Blocks(8, None, minimum=True, scale="float32")}),
    "nested": (swiglu, {"encoding": Nested(16)}),
    "rounded inputs": (biased_swiglu, {"vectors": 2, "round_inputs": True}),
    "nothing exactly": (biased_swiglu, {"vectors": 2, "k_groups": 0}),
}
CASES = [*((name, jnp.float32) for name in BLOCKS), ("biased swiglu", jnp.bfloat16)]
EXACT = [case for case in CASES if case[0] not in ("4 bits", "nothing exactly")]
"""Those whose exact rows are the model's."""


def run(op, x, spec, state, activation, layer=0):
    return jax.jit(lambda x, state, layer: op(x, state, layer, spec=spec, activation=activation))(
        x, state, layer
    )


def by_hand(x, spec, state, weights, activation, layer=0):
    """Each token by itself, from decoded rows, in float64 but for the activation.

    Returns:
      [tokens, d_out], and which groups are exact, bool[tokens, G].
    """

    def wide(array):
        return np.asarray(jnp.asarray(array).astype(jnp.float32), np.float64)

    def decoded(encoding, stored):
        return wide(encoding.decode(stored, layer))

    def rounded(x):
        if not spec.round_inputs:
            return x
        blocks = x.reshape(-1, 32)
        step = np.abs(blocks).max(1, keepdims=True) / 127
        return (np.round(blocks / step) * step).reshape(x.shape)

    def hidden(x, first, vectors):
        pre = tuple(jnp.asarray(x @ rows.T, spec.up_dtype)[None] for rows in first)
        return wide(activation(pre, vectors))[0]

    f, projections, group = spec.width, spec.projections, spec.group
    copy = np.split(decoded(spec.encoding, state.up), projections)
    copy_down = decoded(spec.encoding, state.down).T
    vectors = tuple(vector[layer] for vector in state.vectors)
    norms = np.linalg.norm(wide(weights[-1][layer]), axis=-1)
    norms = norms if spec.criterion == "output" else np.ones(f)
    results, chosen = [], []
    for token in wide(x):
        h = hidden(rounded(token), copy, vectors)
        rank = np.square(h * norms).reshape(-1, group).sum(1)
        best = np.argsort(-rank, kind="stable")[: spec.k_groups]
        mask = np.isin(np.arange(spec.groups), best)
        neurons = np.repeat(mask, group)
        y = rounded(np.where(neurons, 0, h)) @ copy_down
        if spec.k_groups:
            up = decoded(spec.exact, state.exact_up).reshape(f, projections, -1)
            exact = hidden(token, list(np.moveaxis(up, 1, 0)), vectors)
            y = y + np.where(neurons, exact, 0) @ decoded(spec.exact, state.exact_down)
        results.append(y)
        chosen.append(mask)
    return np.stack(results), np.stack(chosen)


def model(x, weights, state, activation, layer=0):
    """The block as a model writes it, in float32."""
    *first, second = (np.asarray(w[layer].astype(jnp.float32)) for w in weights)
    vectors = tuple(vector[layer].astype(jnp.float32) for vector in state.vectors)
    x = np.asarray(x.astype(jnp.float32))
    return np.asarray(activation(tuple(x @ w.T for w in first), vectors)) @ second


def near(got, want, tolerance=1e-5):
    got, want = np.asarray(got.astype(jnp.float32)), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_each_token_has_its_own_top_k_exactly_and_the_others_guessed(name, dtype, tokens):
    activation, sizes = BLOCKS[name]
    spec, state, weights = predicted_ffn(dtype=dtype, layers=2, **sizes)
    x = normal(5, tokens, 32, dtype=dtype)
    got = run(hire_predicted_ffn, x, spec, state, activation, layer=1)
    want, _ = by_hand(x, spec, state, weights, activation, layer=1)
    assert got.dtype == dtype
    near(got, want, 0.02 if dtype == jnp.bfloat16 else 5e-3 if spec.round_inputs else 1e-5)
    assert error(got, model(x, weights, state, activation, 1)) > 1e-4


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "dtype"), EXACT)
@pytest.mark.parametrize("tokens", [1, 3])
def test_with_all_neurons_it_is_the_model(name, dtype, tokens):
    activation, sizes = BLOCKS[name]
    groups = 96 // sizes.get("group", 1)
    spec, state, weights = predicted_ffn(dtype=dtype, **sizes | {"k_groups": groups})
    x = normal(5, tokens, 32, dtype=dtype)
    want, tolerance = model(x, weights, state, activation), 1e-5 if dtype == jnp.float32 else 0.02
    near(run(hire_predicted_ffn, x, spec, state, activation), want, tolerance)
    near(run(dense_predicted_ffn, x, spec, state, activation), want, tolerance)


@pytest.mark.parametrize(
    ("tokens", "group", "k"), [(1, 1, 0), (1, 1, 1), (1, 1, 95), (3, 1, 30), (2, 3, 15), (3, 2, 16)]
)
def test_a_copy_that_loses_nothing_gives_the_model_for_every_k(tokens, group, k):
    spec, state, weights = predicted_ffn(
        encoding=Float("float32"), vectors=2, group=group, k_groups=k
    )
    x = normal(5, tokens, 32)
    got = run(hire_predicted_ffn, x, spec, state, biased_swiglu)
    near(got, model(x, weights, state, biased_swiglu))


def test_more_neurons_exactly_lose_less():
    x, errors = normal(5, 1, 32), []
    for k in (0, 5, 20, 95, 96):
        spec, state, weights = predicted_ffn(encoding=Blocks(4), k_groups=k)
        got = run(hire_predicted_ffn, x, spec, state, swiglu)
        errors.append(error(got, model(x, weights, state, swiglu)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.05
    assert errors[-1] < 1e-5


def test_without_exact_rows_dense_is_the_copy():
    spec, state, weights = predicted_ffn(k_groups=0)
    x = normal(5, 3, 32)
    want, _ = by_hand(x, spec, state, weights, swiglu)
    near(run(dense_predicted_ffn, x, spec, state, swiglu), want)


SPEC, STATE, _ = predicted_ffn(vectors=2)
HIRE = jax.jit(lambda x: hire_predicted_ffn(x, STATE, 0, spec=SPEC, activation=biased_swiglu))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2))
def test_a_token_does_not_depend_on_those_beside_it(seed, token):
    batch = normal(seed, 3, 32)
    together = HIRE(batch)
    others = np.arange(3) != token
    changed = HIRE(np.where(others[:, None], np.nan, batch))
    np.testing.assert_allclose(together[token], changed[token], rtol=1e-5, atol=1e-6)
    assert np.isnan(np.asarray(changed)[others]).all()
    np.testing.assert_allclose(
        HIRE(np.asarray(batch)[[token]])[0], together[token], rtol=1e-4, atol=1e-5
    )


def test_inputs_are_rounded_where_that_is_asked_for():
    x = normal(5, 1, 32)
    rounded = dataclasses.replace(SPEC, round_inputs=True)
    got, want = (run(hire_predicted_ffn, x, s, STATE, biased_swiglu) for s in (rounded, SPEC))
    assert 1e-4 < error(got, want) < 0.02


def test_an_activation_that_knows_the_tokens():
    """Such as one that masks some of them: it is run for all of them at once, in their order."""
    shown = jnp.array([[1.0], [0.0], [2.0]])

    def masked(pre, vectors):
        return biased_swiglu(pre, vectors) * shown

    got = run(hire_predicted_ffn, normal(5, 3, 32), SPEC, STATE, masked)
    near(got, HIRE(normal(5, 3, 32)) * shown)


def test_layers_under_scan_vmap_and_remat():
    spec, state, weights = predicted_ffn(layers=3, vectors=2)
    x = normal(5, 2, 32)

    @jax.checkpoint
    def block(x, layer):
        return hire_predicted_ffn(x, state, layer, spec=spec, activation=biased_swiglu)

    _, got = jax.jit(lambda: jax.lax.scan(lambda c, i: (c, block(x, i)), 0, jnp.arange(3)))()
    for layer in range(3):
        near(got[layer], by_hand(x, spec, state, weights, biased_swiglu, layer)[0])
    mapped = jax.jit(jax.vmap(lambda row: block(row[None], 1)[0]))(x)
    near(mapped, got[1])


def test_differentiable_with_the_choice_held_constant():
    spec, state, weights = predicted_ffn()
    x = normal(5, 2, 32)
    mask = by_hand(x, spec, state, weights, swiglu)[1]
    copy = spec.encoding.decode(state.up, 0), spec.encoding.decode(state.down, 0)

    def hidden(x, gate, up):
        return swiglu((x @ gate.T, x @ up.T), ())

    def wanted(x):
        guess = hidden(x, *jnp.split(copy[0], 2)) * ~mask
        exact = hidden(x, weights[0][0], weights[1][0]) * mask
        return jnp.square(guess @ copy[1].T + exact @ weights[2][0]).sum()

    def hire(x):
        return jnp.square(hire_predicted_ffn(x, state, 0, spec=spec, activation=swiglu)).sum()

    got, want = jax.jit(jax.grad(hire))(x), jax.jit(jax.grad(wanted))(x)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["biased swiglu", "groups", "nothing exactly"])
def test_measured(name):
    """What it says of some tokens is what each of them loses, and which neurons it misses."""
    activation, sizes = BLOCKS[name]
    spec, state, weights = predicted_ffn(encoding=Blocks(4), **sizes)
    x = normal(5, 20, 32)

    @jax.jit
    def measure(x):
        measured = measured_predicted_ffn(x, state, 0, spec=spec, activation=activation)
        return measured.exact, measured.rewritten, quality(measured.comparison)

    exact, rewritten, sums = measure(x)
    got, chosen = by_hand(x, spec, state, weights, activation)
    near(rewritten, got)
    want, _ = by_hand(x, spec, state, weights, activation)
    dense = model(x, weights, state, activation) if spec.k_groups else got
    near(exact, dense)
    errors = np.linalg.norm(want - dense, axis=1) / np.linalg.norm(dense, axis=1)
    np.testing.assert_allclose(sums.error, errors.sum(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(sums.error_exact, sums.error)
    if not spec.k_groups:
        assert sums.hits.size == 0
        return
    exact_spec = dataclasses.replace(spec, encoding=Float("float32"))
    full = state._replace(
        up={"rows": jnp.concatenate(weights[:-1], 1)}, down={"rows": weights[-1].swapaxes(1, 2)}
    )
    true = by_hand(x, exact_spec, full, weights, activation)[1]
    hits = np.bincount((true & chosen).sum(1), minlength=spec.k_groups + 1)
    np.testing.assert_array_equal(sums.hits, hits)
    assert hits[-1] < 20  # 4 bits miss some


def test_nothing_is_widened_or_copied_for_one_token():
    """Neither a layer of the stacks nor the whole of a compressed matrix, in a loop over layers."""
    layers, f, d = 2, 3072, 512
    spec, state, _ = predicted_ffn(layers=layers, width=f, d=d, k_groups=32)

    def loop(x, state):
        def block(x, layer):
            y = hire_predicted_ffn(x, state, layer, spec=spec, activation=swiglu)
            return x + y, None

        return jax.lax.scan(block, x, jnp.arange(layers))[0]

    compiled = optimized(loop).lower(jnp.ones((1, d)), state).compile()
    chunk, rows = 3 << 20, 3 * 32 * d * 4
    smallest_copy = f * d  # of the second matrix, in 8 bits
    assert smallest_copy + chunk > 4 << 20
    assert compiled.memory_analysis().temp_size_in_bytes < chunk + rows + (1 << 19)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_lowers_for_every_platform(platform):
    jax.jit(lambda x, s: hire_predicted_ffn(x, s, 0, spec=SPEC, activation=biased_swiglu)).trace(
        jnp.ones((2, 32)), STATE
    ).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 5}, "group=5 must divide the width 96"),
        ({"k_groups": 97}, "k_groups=97 must be between 0 and"),
        ({"k_groups": -1}, "k_groups=-1 must be between 0 and"),
        ({"k_groups": 0}, "with k_groups=0"),
        ({"exact": None}, "exact=None with k_groups=12"),
        ({"criterion": "norm"}, "criterion='norm' must be .hidden. or .output."),
    ],
)
def test_a_spec_out_of_range(changes, message):
    with pytest.raises(HireRewriteError, match=message):
        dataclasses.replace(SPEC, **changes)

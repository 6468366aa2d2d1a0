import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops import quantize
from hire_rewrite.ops.certify import rounding
from hire_rewrite.ops.predictors import Certifying, Predictor, Quantized, ScoresRows, certifies
from tests.ops.cases import as_other_backends, fitted, normal

EVERY = [Quantized(), Quantized(4, 8)]


@functools.cache
def proving(predictor):
    """A function of rows [n, d] to a layer of what guesses them, and of what bounds the guesses."""

    @jax.jit
    def fit(rows):
        state = predictor.fit(rows)
        both = state, predictor.fit_bound(rows, state)
        return jax.tree.map(lambda leaf: leaf[None], both)

    return fit


@pytest.mark.parametrize("predictor", EVERY)
def test_it_is_a_predictor(predictor):
    assert isinstance(predictor, Predictor)
    assert isinstance(predictor, ScoresRows)
    assert isinstance(predictor, Certifying)
    assert certifies(predictor)
    assert not predictor.wants_calibration


def test_it_prints_as_it_is_written():
    assert repr(Quantized()) == "Quantized(bits=8)"
    assert repr(Quantized(4)) == "Quantized(bits=4)"
    assert repr(Quantized(4, block=16)) == "Quantized(bits=4, block=16)"


def test_the_error_of_8_bits_is_within_its_bound():
    rows, x = normal(0, 300, 32), normal(1, 4, 32) * np.arange(1.0, 33.0)
    scores = Quantized().score(fitted(Quantized(), rows[None]), x, 0)
    bound = jnp.abs(x).sum(1)[:, None] * jnp.abs(rows).max(1) / 254
    assert (jnp.abs(scores - x @ rows.T) <= bound * 1.001).all()


def test_the_error_of_4_bits_is_half_a_step_of_each_block():
    rows, x = normal(0, 300, 32), normal(1, 4, 32) * np.arange(1.0, 33.0)
    scores = Quantized(4, 8).score(fitted(Quantized(4, 8), rows[None]), x, 0)
    steps = jnp.abs(rows).reshape(300, 4, 8).max(-1) / 7.5
    bound = jnp.abs(x).reshape(4, 4, 8).sum(-1) @ steps.T / 2
    assert (jnp.abs(scores - x @ rows.T) <= bound * 1.04).all()


@pytest.mark.parametrize("predictor", EVERY)
def test_layers_are_picked(predictor):
    rows, x = normal(0, 3, 300, 32, dtype=jnp.bfloat16), normal(1, 2, 32, dtype=jnp.bfloat16)
    state = fitted(predictor, rows)
    got = jax.jit(predictor.score)(state, x, jnp.int32(2))
    assert got.dtype == jnp.float32
    want = x.astype(jnp.float32) @ rows[2].astype(jnp.float32).T
    assert jnp.abs(got - want).max() < (0.2 if predictor.bits == 8 else 2.0)
    assert jnp.corrcoef(got.ravel(), want.ravel())[0, 1] > (0.999 if predictor.bits == 8 else 0.99)


@pytest.mark.parametrize("predictor", EVERY)
def test_chosen_rows_are_scored_as_all_are(predictor):
    state, x = fitted(predictor, normal(0, 2, 300, 32)), normal(1, 3, 32)
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 300, (3, 7)), jnp.int32)
    got = jax.jit(predictor.score_rows)(state, x, jnp.int32(1), rows)
    want = jnp.take_along_axis(predictor.score(state, x, 1), rows, axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("predictor", EVERY)
@pytest.mark.parametrize("tokens", [1, 9])
def test_its_bytes_are_those_of_its_state(predictor, tokens):
    state = jax.eval_shape(predictor.fit, jax.ShapeDtypeStruct((300, 32), jnp.float32))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert predictor.bytes(300, 32, jnp.float32, tokens) == size


def test_4_bits_read_little_more_than_half_of_8():
    assert Quantized(4).bytes(1000, 576, jnp.float32) == 1000 * (288 + 36)
    assert Quantized(8).bytes(1000, 576, jnp.float32) == 1000 * (576 + 4)


@pytest.fixture(params=["cpu", "other"])
def backend(request, monkeypatch):
    """The products and the bounds of CPU, or those of other backends, here."""
    if request.param == "cpu":
        yield request.param
        return
    monkeypatch.setattr(rounding, "platform", lambda _, other: jnp.float32(other))
    with as_other_backends():
        yield request.param


@pytest.mark.sampled(6)
@pytest.mark.parametrize("predictor", EVERY)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(jnp.float32, 1e-30), (jnp.float32, 1e15), (jnp.bfloat16, 1.0)]
)
def test_its_errors_are_within_the_bound(predictor, dtype, scale, backend):
    rows = (np.asarray(normal(0, 300, 64)) * scale).astype(dtype)
    rows *= (10.0 ** np.random.default_rng(1).uniform(-3, 0, (300, 1))).astype(dtype)
    x = (normal(1, 8, 64) * np.arange(1.0, 65.0)).astype(dtype)
    state, extra = proving(predictor)(jnp.asarray(rows))
    bound = np.asarray(predictor.bound(state, extra, x, 0), np.float64)
    wide = np.asarray(x, np.float64), np.asarray(rows, np.float64)
    error = np.abs(predictor.score(state, x, 0) - wide[0] @ wide[1].T)
    assert (error <= bound).all()
    # Of random vectors x·r is about ‖x‖ ‖r‖ / √d: the bound is no wider than need be.
    assert np.median(error / bound) > (0.02 if backend == "other" else 0.05)
    assert (extra["norm"][0] >= np.linalg.norm(wide[1], axis=1)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(EVERY))
def test_the_bound_holds_for_the_worst_vector(seed, predictor):
    """x along the residual of a row: the inequality of Cauchy and Schwarz is then an equation."""
    rows = normal(seed, 20, 64)
    state, extra = proving(predictor)(jnp.asarray(rows))
    units = predictor.score(state, jnp.eye(64), 0).T
    x = rows - units
    bound = np.asarray(predictor.bound(state, extra, x, 0), np.float64).diagonal()
    exact = np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T
    error = np.abs(predictor.score(state, x, 0) - exact).diagonal()
    assert (error <= bound).all()
    rounded = quantize.rounded_blocks(x, predictor.block) if predictor.bits == 4 else x
    moved = np.linalg.norm(x - rounded, axis=1) * np.linalg.norm(units, axis=1)
    assert (error >= 0.99 * (bound - moved) - moved).all()


@pytest.mark.parametrize("predictor", EVERY)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_bound_for_what_is_not_finite(predictor, value):
    rows = normal(0, 5, 16).at[3, 2].set(value)
    state, extra = proving(predictor)(jnp.asarray(rows))
    bound = predictor.bound(state, extra, normal(1, 2, 16).at[1, 0].set(value), 0)
    np.testing.assert_array_equal(
        np.isfinite(bound), [[True, True, True, False, True], [False] * 5]
    )


@pytest.mark.parametrize("bits", [16, 8.5, True, 2, "8"])
def test_other_numbers_of_bits(bits):
    with pytest.raises(HireRewriteError, match=r"Quantized: bits=.*give bits=8 or bits=4"):
        Quantized(bits)


@pytest.mark.parametrize(
    ("bits", "block", "message"),
    [
        (4, 0, "block=0 must be an even int"),
        (4, True, "block=True must be"),
        (4, 2.0, "block=2.0 must be"),
        (4, 33, "block=33 must be even: two numbers share a byte"),
        (8, 32, "block=32 is for bits=4"),
    ],
)
def test_blocks_that_cannot_be(bits, block, message):
    with pytest.raises(HireRewriteError, match=message):
        Quantized(bits, block)


def test_blocks_that_do_not_divide_the_rows():
    Quantized(4).check(100, 576, site="head")
    with pytest.raises(
        HireRewriteError, match=r"^head: Quantized: block=32 does .* 48: .*block=24"
    ):
        Quantized(4).check(100, 48, site="head")
    with pytest.raises(HireRewriteError, match=r"length 47: give bits=8"):
        Quantized(4).check(100, 47)
    with pytest.raises(HireRewriteError, match="block=32 does not divide"):
        Quantized(4).fit(normal(0, 10, 48))

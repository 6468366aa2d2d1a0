import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hire_rewrite.ops.certify import rounding

SEEDS = st.integers(0, 10**6)


def vectors(seed, scale):
    """Numbers of very different sizes, in f32."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-8, 0, (3, 300))
    return (scale * sizes * rng.standard_normal((3, 300))).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from([1e-37, 1e-30, 1e-25, 1.0, 1e15, 1e30]))
def test_norms_are_bounds_and_tight(seed, scale):
    v = vectors(seed, scale)
    got = np.asarray(NORMS(v), np.float64)
    exact = np.linalg.norm(v.astype(np.float64), axis=-1)
    assert (got >= exact).all()
    if scale > 1e-30:
        np.testing.assert_allclose(got, exact, rtol=1e-3)


NORMS = jax.jit(rounding.norms)
SUMS = jax.jit(lambda p: rounding.signed_sums(p)[:2])


def test_norms_of_what_is_not_finite_are_infinite():
    got = rounding.norms(jnp.array([[0.0, 0.0], [1.0, jnp.nan], [-jnp.inf, 1.0], [3e38, 3e38]]))
    assert got[0] < 1e-30
    assert np.isposinf(got[1:]).all()
    assert 4.2e30 < rounding.norms(jnp.array([3e30, 3e30])) < 4.3e30


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_signed_sums_are_within_their_roundings(seed):
    products = vectors(seed, 1.0)
    positive, negative = (np.asarray(part, np.float64) for part in SUMS(products))
    wide = products.astype(np.float64)
    bound = rounding.gamma(rounding.signed_sums(products)[2], rounding.CPU_UNIT)
    for got, exact in ((positive, wide), (negative, -wide)):
        want = np.maximum(exact, 0).sum(-1)
        assert (np.abs(got - want) <= bound * want).all()


@pytest.mark.parametrize(("d", "roundings"), [(1, 0), (2, 1), (8, 7), (9, 8), (576, 22)])
def test_how_many_roundings_a_sum_has(d, roundings):
    positive, negative, count = rounding.signed_sums(jnp.ones((2, d)).at[1].set(-2.0))
    assert count == roundings
    np.testing.assert_array_equal(positive, [d, 0])
    np.testing.assert_array_equal(negative, [0, 2 * d])


def test_the_compiler_does_not_merge_the_sums():
    """Otherwise one long sum might be rounded more often than was counted."""
    text = jax.jit(lambda p: rounding.signed_sums(p)[:2]).lower(jnp.ones((2, 64))).as_text()
    assert text.count("optimization_barrier") == 4


def test_power_below():
    numbers = np.array([1.0, 1.5, 2.0, 3.999, 4.0, 1e-3, np.inf, np.nan], np.float32)
    got = np.asarray(rounding.power_below(jnp.asarray(numbers)))
    np.testing.assert_array_equal(got, [1, 1, 2, 2, 4, 2.0**-10, np.inf, np.inf])


def test_gamma_says_nothing_about_too_many_roundings():
    assert rounding.gamma(100, 2.0**-24) == pytest.approx(100 * 2.0**-24, rel=1e-4)
    assert rounding.gamma(1 << 24, 2.0**-24) == float("inf")


def test_a_bound_near_overflow_is_infinite():
    got = np.asarray(rounding.at_least(jnp.array([0.0, 1.0, 1e37, jnp.inf, jnp.nan])))
    assert 0 < got[0] < 1e-37
    assert 1.0 < got[1] < 1.0001
    assert np.isposinf(got[2:]).all()


def test_platforms():
    got = jax.jit(lambda: rounding.platform(1.0, 2.0))()
    assert 1.0 <= got < 1.001
    for name in ("cuda", "tpu"):
        jax.jit(lambda: rounding.platform(1.0, 2.0)).trace().lower(lowering_platforms=(name,))


@pytest.mark.parametrize(
    ("dtype", "precision", "unit"),
    [
        ("float32", None, 2.0**-8),
        ("bfloat16", None, 0.0),
        ("float32", jax.lax.Precision.HIGHEST, 0.0),
        ("float32", (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST), 0.0),
        ("float32", (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT), 2.0**-8),
    ],
)
def test_how_much_operands_may_be_rounded(dtype, precision, unit):
    assert rounding.operand_unit(dtype, precision) == unit


def test_what_is_flushed_grows_with_the_vectors():
    small, large = (float(rounding.flushed(8, jnp.float32(size))) for size in (0.0, 1e9))
    assert 0 < small < 1e-33
    assert large > 1e8 * small

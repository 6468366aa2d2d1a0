import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.graph.reports import combine
from hire_rewrite.ops.moments import Moments
from tests.ops.cases import normal


@pytest.mark.parametrize("mean", [0.0, 3.0, 1e3, -3e4])
@pytest.mark.parametrize("sizes", [(40,), (7, 0, 1, 32)])
def test_mean_and_covariance_are_those_of_numpy(mean, sizes):
    """Whatever the mean is beside the deviations, and whatever batches the tokens come in."""
    x = jnp.asarray(mean + np.asarray(normal(0, 40, 5)) * np.arange(1.0, 6.0), jnp.float32)
    batches = jnp.split(x, np.cumsum(sizes)[:-1])
    total = Moments.zeros(5)
    for batch in batches:
        total = jax.jit(combine)(total, Moments.of(batch))
    wide = np.asarray(x, np.float64)
    assert total.count == 40
    np.testing.assert_allclose(total.mean, wide.mean(0), rtol=1e-6, atol=1e-5)
    # Each batch's mean is rounded to float32, and what it is off by times a deviation is left.
    off = 0.0 if len(sizes) == 1 else abs(mean) * 2.0**-24 * np.abs(wide - wide.mean(0)).max()
    want = np.cov(wide.T, bias=True)
    np.testing.assert_allclose(total.covariance(), want, rtol=1e-4, atol=1e-4 + off)


def test_a_part_of_a_report_is_combined():
    x = normal(0, 4, 6, 5)
    reports = [{"site": (Moments.of(batch), jnp.ones(3))} for batch in x]
    moments, ones = combine(combine(reports[0], reports[1]), reports[2])["site"]
    np.testing.assert_allclose(moments.covariance(), np.cov(x[:3].reshape(18, 5).T, bias=True),
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    np.testing.assert_array_equal(ones, 3.0)


def test_all_leading_axes_are_tokens():
    x = normal(0, 2, 3, 5)
    assert Moments.of(x).count == 6
    np.testing.assert_allclose(Moments.of(x).scatter, Moments.of(x.reshape(6, 5)).scatter)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_they_are_float32(dtype):
    moments = Moments.of(normal(0, 8, 4, dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("float32")}


def test_layers_are_a_leading_axis():
    x = normal(0, 2, 20, 5)
    layers = jax.jit(jax.vmap(Moments.of))(x)
    both = jax.jit(lambda m: m.combine(m))(layers)
    for i in range(2):
        one = Moments.of(x[i])
        np.testing.assert_allclose(both.mean[i], one.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(both.covariance()[i], one.covariance(), rtol=1e-4, atol=1e-5)


def test_no_tokens_have_no_nan():
    nothing = Moments.zeros(3).combine(Moments.of(jnp.zeros((0, 3))))
    assert not any(leaf.any() for leaf in jax.tree.leaves((nothing, nothing.covariance())))


def test_they_are_a_pytree_under_jit_and_scan():
    x = normal(0, 4, 6, 5)
    add = lambda total, batch: (total.combine(Moments.of(batch)), None)  # noqa: E731
    total, _ = jax.lax.scan(add, Moments.zeros(5), x)
    np.testing.assert_allclose(total.scatter, Moments.of(x).scatter, rtol=1e-5, atol=1e-5)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.ops.moments import Moments
from tests.ops.cases import normal


def test_mean_and_covariance_are_those_of_numpy():
    x = jnp.asarray(3.0 + normal(0, 40, 5) * np.arange(1.0, 6.0))
    mean, covariance = Moments.of(x).mean_and_covariance()
    np.testing.assert_allclose(mean, np.mean(x, 0), rtol=1e-5)
    np.testing.assert_allclose(covariance, np.cov(x.T, bias=True), rtol=1e-3, atol=1e-3)


def test_batches_add_up():
    x = normal(0, 30, 5)
    whole = Moments.of(x)
    parts = Moments.zeros(5) + Moments.of(x[:7]) + Moments.of(x[7:])
    assert whole.count == parts.count == 30
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_all_leading_axes_are_tokens():
    x = normal(0, 2, 3, 5)
    assert Moments.of(x).count == 6
    np.testing.assert_allclose(Moments.of(x).second, Moments.of(x.reshape(6, 5)).second)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_are_float32(dtype):
    moments = Moments.of(normal(0, 8, 4, dtype=dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("float32")}


def test_layers_are_a_leading_axis():
    x = normal(0, 2, 20, 5)
    layers = jax.jit(jax.vmap(Moments.of))(x)
    mean, covariance = jax.jit(lambda m: (m + m).mean_and_covariance())(layers)
    of = jax.jit(lambda x: Moments.of(x).mean_and_covariance())
    for i in range(2):
        one = of(x[i])
        np.testing.assert_allclose(mean[i], one[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(covariance[i], one[1], rtol=1e-4, atol=1e-5)


def test_no_tokens_have_no_nan():
    mean, covariance = Moments.zeros(3).mean_and_covariance()
    assert not mean.any()
    assert not covariance.any()


def test_they_are_a_pytree_under_jit_and_scan():
    x = normal(0, 4, 6, 5)
    total, _ = jax.lax.scan(lambda m, batch: (m + Moments.of(batch), None), Moments.zeros(5), x)
    np.testing.assert_allclose(total.second, Moments.of(x).second, rtol=1e-5, atol=1e-5)

"""Selection by buckets against lax.top_k."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hire_rewrite.ops.top_k.buckets import bucket_top_k


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("n", [100, 65536, 70001])
def test_finds_what_lies_at_random(n, dtype):
    rng = np.random.default_rng(n)
    x = jnp.asarray(rng.normal(size=(3, n)) * 1e4).astype(dtype)
    values, places = bucket_top_k(x, 64)
    wanted = lax.top_k(x, 64)
    np.testing.assert_array_equal(values, wanted[0])
    np.testing.assert_array_equal(places, wanted[1])


def test_never_loses_the_greatest():
    x = np.zeros((2, 70001), np.float32)
    x[0, -1], x[1, -1] = 1.0, np.nan
    values, places = bucket_top_k(jnp.asarray(x), 64)
    assert places[:, 0].tolist() == [70000, 70000]
    assert values[0, 0] == 1.0
    assert np.isnan(values[1, 0])
    # All others are equal: of each bucket the first.
    assert (np.diff(np.asarray(places[:, 1:])) > 0).all()


def test_loses_what_is_crowded_together():
    x = np.zeros((1, 65536), np.float32)
    x[0, ::512] = np.arange(128) + 1.0  # all in one bucket
    values, _ = bucket_top_k(jnp.asarray(x), 64)
    assert 0 < (values > 0).sum() < 64
    assert values[0, 0] == 128

"""Where a mask is true: lists of each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.ops.top_k.listed import listed


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (64, 64), (203, 50)])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_places_are_those_of_numpy(tokens, n, k, share):
    mask = np.random.default_rng(n).random((tokens, n)) < share
    for function in (listed, listed.reference):
        places, counts = jax.jit(function, static_argnames="k")(jnp.asarray(mask), k=k)
        assert (places.dtype, counts.dtype) == (jnp.int32, jnp.int32)
        for row, got, count in zip(mask, places, counts, strict=True):
            (want,) = np.nonzero(row)
            np.testing.assert_array_equal(got, np.pad(want, (0, k), constant_values=-1)[:k])
            assert count == want.size


def test_under_vmap():
    mask = jnp.asarray(np.random.default_rng(0).random((4, 2, 20)) < 0.5)
    several = jax.vmap(lambda mask: listed(mask, k=8))(mask)
    for i in range(4):
        for got, want in zip(several, listed(mask[i], k=8), strict=True):
            np.testing.assert_array_equal(got[i], want)

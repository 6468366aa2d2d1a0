"""Matrices are encoded as they are where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.sites.matrices import Matrices

WEIGHT = jax.random.normal(jax.random.key(0), (3, 8, 4, 64))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize(("axes", "n_axes"), [((0, 1, 2), 2), ((2, 0, 1), 1), ((1, 2, 0), 2)])
def test_layouts(stacked, axes, n_axes):
    weight = WEIGHT if stacked else WEIGHT[0]
    layers = WEIGHT if stacked else WEIGHT[:1]
    n = int(np.prod([WEIGHT.shape[1 + axis] for axis in axes[:n_axes]]))
    rows = jnp.stack([layer.transpose(axes).reshape(n, -1) for layer in layers])
    matrices = Matrices(weight, axes, n_axes, stacked)
    np.testing.assert_array_equal(matrices.on_host(), rows)
    np.testing.assert_array_equal(matrices.transposed.on_host(), jnp.swapaxes(rows, 1, 2))
    encoding = hire.Blocks(8, None, scale="float32")
    want = jax.tree.map(lambda *parts: jnp.stack(parts), *map(encoding.store, rows))
    for got in (
        matrices.stored(encoding),
        jax.jit(lambda w: Matrices(w, axes, n_axes, stacked).stored(encoding))(weight),
    ):
        assert {name: array.shape for name, array in got.items()} == {
            name: array.shape for name, array in want.items()
        }
        np.testing.assert_allclose(got["scale"], want["scale"], rtol=1e-6)
        assert abs(got["integers"].astype(int) - want["integers"].astype(int)).max() <= 1


def test_exactly_where_it_can():
    weight = jnp.round(WEIGHT[:, 0] * 8) / 8  # of a grid of eighths
    encoding = hire.Blocks(8, 32)
    matrices = Matrices(weight, (0, 1), 1)
    np.testing.assert_array_equal(encoding.decode(matrices.stored(encoding), 1), weight[1])

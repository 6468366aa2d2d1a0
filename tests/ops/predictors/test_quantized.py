import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hire_rewrite.errors import HireRewriteError
from hire_rewrite.ops.predictors import Predictor, Quantized
from tests.ops.cases import fitted, normal


def test_it_is_a_predictor():
    assert isinstance(Quantized(), Predictor)
    assert not Quantized().wants_calibration
    assert repr(Quantized()) == "Quantized(bits=8)"


def test_the_error_is_within_its_bound():
    rows, x = normal(0, 300, 32), normal(1, 4, 32) * np.arange(1.0, 33.0)
    scores = Quantized().score(fitted(Quantized(), rows[None]), x, 0)
    bound = jnp.abs(x).sum(1)[:, None] * jnp.abs(rows).max(1) / 254
    assert (jnp.abs(scores - x @ rows.T) <= bound * 1.001).all()


def test_layers_are_picked():
    rows, x = normal(0, 3, 300, 32, dtype=jnp.bfloat16), normal(1, 2, 32, dtype=jnp.bfloat16)
    state = fitted(Quantized(), rows)
    got = jax.jit(Quantized().score)(state, x, jnp.int32(2))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, x.astype(jnp.float32) @ rows[2].astype(jnp.float32).T, rtol=0.05, atol=0.2
    )


def test_its_bytes_are_those_of_its_state():
    state = jax.eval_shape(Quantized().fit, jax.ShapeDtypeStruct((300, 32), jnp.float32))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert Quantized().bytes(300, 32, jnp.float32) == size


@pytest.mark.parametrize("bits", [4, 16, 8.5, True])
def test_other_numbers_of_bits(bits):
    with pytest.raises(HireRewriteError, match=r"Quantized: bits=.*give bits=8"):
        Quantized(bits)

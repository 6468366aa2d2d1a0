"""Bounds of results: no argument within the bounds gives a result outside of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hire_rewrite.ops.certify.interval import Interval, enclosure

N, PLACE = 64, jnp.int32(1)
CODE = {
    "relu": lambda a, b: jax.nn.relu(a),
    "squared": lambda a, b: jnp.square(jax.nn.relu(a + b)),
    "gated": lambda a, b: jax.nn.relu(a) * b,
    "clipped": lambda a, b: jnp.clip(a, 0, 2) - 0.0 * b,
    "threshold": lambda a, b: jnp.where(a > 0.3, a, 0),
    "by a mask": lambda a, b: a * (a > 0) * b,
    "both": lambda a, b: jnp.where((a > 0) & ~(b < 0.1), a * b, 0.0),
    "shrunk": lambda a, b: jnp.sign(a) * jnp.maximum(jnp.abs(a) - 0.5, 0),
    "rounded": lambda a, b: jax.nn.relu(lax.reduce_precision(a, 8, 2) - 0.99) * b,
    "quotient": lambda a, b: a / (1 + b**2),
    "even and odd powers": lambda a, b: a**2 - b**3,
    "bounded": lambda a, b: jax.nn.sigmoid(a) * jnp.tanh(b) + jnp.minimum(a, b),
    "jit": lambda a, b: jax.jit(lambda a: jnp.maximum(a, -0.0))(a) * b,
    "gelu": lambda a, b: jax.nn.gelu(a),
    "integers": lambda a, b: jnp.where(a < 1, jnp.arange(N), b),
    "padded": lambda a, b: jnp.pad(jax.nn.relu(a), (2, 3))[2 : N + 2] * b,
    "an expert's": lambda a, b: lax.dynamic_index_in_dim(
        jnp.broadcast_to(jax.nn.relu(a), (3, N)) * b, PLACE - 3, keepdims=False
    ),
}
ZERO = (
    *("relu", "squared", "gated", "clipped", "threshold", "by a mask", "both", "shrunk", "jit"),
    *("padded", "an expert's"),
)


def intervals(seed, spread):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(2, N)).astype(np.float32)
    high = low + spread * np.abs(rng.normal(size=(2, N))).astype(np.float32)
    return [Interval(*map(jnp.asarray, ends)) for ends in zip(low, high, strict=True)]


@functools.cache
def compiled(name, dtype):
    """The bounds of a code, the code, and the code as XLA fuses it, for these types."""
    code = CODE[name]

    def bounds(ins):
        return enclosure(code, ins, jnp.dtype(dtype))

    def run(a, b):
        return code(a.astype(dtype), b.astype(dtype)).astype(jnp.float32)

    return jax.jit(bounds), run, jax.jit(run)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CODE)
def test_results_are_within_the_bounds(name, dtype):
    bounds, *runs = compiled(name, dtype)
    for seed in range(20):
        ins = intervals(seed, [0.0, 0.01, 0.5][seed % 3])
        ends = bounds(ins)
        known = ~np.isnan(ends.low)
        assert known.all() or name not in ZERO
        for shares in [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.3, 0.8)]:
            some = [i.low + share * (i.high - i.low) for i, share in zip(ins, shares, strict=True)]
            for run in runs if seed < 3 else runs[1:]:
                got = np.asarray(run(*some))
                assert (got >= ends.low)[known].all()
                assert (got <= ends.high)[known].all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CODE)
def test_of_numpys_ends_numpy_computes_the_same(name, dtype):
    ins = intervals(0, 0.5)
    ends = enclosure(CODE[name], [Interval(*map(np.asarray, i)) for i in ins], jnp.dtype(dtype))
    for end, jaxs in zip(ends, compiled(name, dtype)[0](ins), strict=True):
        assert isinstance(end, np.ndarray) or name == "an expert's"  # PLACE is JAX's
        np.testing.assert_allclose(end, jaxs, rtol=1e-6, atol=1e-6)
    if name in ZERO:
        assert np.array_equal(ends.is_zero, compiled(name, dtype)[0](ins).is_zero)


@pytest.mark.parametrize("name", ZERO)
def test_zeros_are_seen(name):
    ends = enclosure(CODE[name], intervals(0, 0.01), jnp.float32)
    got = np.asarray(CODE[name](*(i.low for i in intervals(0, 0.01))))
    seen = np.asarray(ends.is_zero)
    assert not got[seen].any()
    assert seen.sum() > 0.9 * (got == 0).sum() > 3


def test_of_what_is_not_known_nothing_is_said():
    (one, other) = intervals(0, 0.1)
    wide = one._replace(high=jnp.full(N, jnp.inf), low=jnp.full(N, -jnp.inf))
    unknown = one._replace(low=jnp.full(N, jnp.nan))
    assert not enclosure(lambda a: jnp.cumsum(a) * 0.0, [one], jnp.float32).is_zero.any()
    assert not enclosure(lambda a: jnp.exp(a) * 0.0, [one], jnp.float32).is_zero.any()
    for worst in (wide, unknown):
        assert not enclosure(lambda a: jax.nn.relu(-1.0) * a, [worst], jnp.float32).is_zero.any()
    assert not enclosure(jax.nn.relu, [unknown], jnp.float32).is_zero.any()
    assert enclosure(lambda a: jax.nn.relu(-1.0) * a, [other], jnp.float32).is_zero.all()

"""Blocks that select among their neurons: without rules those whose gates alone say which."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire
from tests.cases import inputs, rand

D, F, K = 64, 512, 32
PARAMS = {"up": rand(D, F), "gate": rand(D, F, seed=1), "down": rand(F, D, seed=2)}
X = inputs(3, D) * np.array([[1.0], [4.0], [0.2]], np.float32)


def _kth(h, k=K):
    return lax.top_k(h, k)[0][..., -1:]


def _kept(h, threshold):
    return jnp.where(h >= threshold, h, 0.0)


def _block(select):
    """Of what a function selects of the pre-activations, and of what it is given besides."""
    return lambda p, x, *given: select(x @ p["up"], *given) @ p["down"]


def _sorted(h, k):
    return _kept(h, jnp.take(-jnp.sort(-h, -1), k - 1, axis=-1)[..., None])


def _ranks(h, k):
    return jnp.where(jnp.argsort(jnp.argsort(-h)) < k, h, 0.0)


def _cut(h, k):
    return _kept(h, lax.dynamic_slice_in_dim(-jnp.sort(-h, -1), k - 1, 1, -1))


def _all_tokens(h):
    return _kept(h, lax.top_k(h.reshape(-1), K * len(h))[0][-1])


def _gated(p, x):
    h = x @ p["up"]
    return (_kept(h, _kth(h)) * (x @ p["gate"])) @ p["down"]


def _of_relu(h):
    h = jax.nn.relu(h)
    return _kept(h, _kth(h))


NOT_ALONE = {
    # Something that is given decides: how many, whether, or in which direction.
    "k at run time": (_block(_sorted), jnp.int32(200)),
    "k at run time, of ranks": (_block(_ranks), jnp.int32(200)),
    "k at run time, of a slice": (_block(_cut), jnp.int32(200)),
    "a flag": (
        _block(lambda h, on: jnp.where(on, _kept(jax.nn.relu(h), _kth(h)), jax.nn.relu(h))),
        jnp.array(False),
    ),
    "a sign": (_block(lambda h, s: _kept(h * s, _kth(h * s))), jnp.float32(-1)),
    "a sign for each token": (_block(lambda h, s: _kept(h * s, _kth(h * s))), -X[:, :1]),
    "a share of the threshold": (_block(lambda h, a: _kept(h, a * _kth(h))), jnp.float32(0.5)),
    # Tokens decide together.
    "of all tokens": (_block(_all_tokens),),
    "the least threshold": (_block(lambda h: _kept(h, _kth(h).min(0, keepdims=True))),),
    "another token's threshold": (_block(lambda h: _kept(h, jnp.roll(_kth(h), 1, 0))),),
    # Sizes decide.
    "at most five": (_block(lambda h: _kept(h, jnp.minimum(_kth(h), 5.0))), 20),
    "and all that are large": (
        _block(lambda h: jnp.where((h >= _kth(h)) | (h > 6.0), h, 0.0)),
        20,
    ),
    "and all that are near": (_block(lambda h: _kept(h, _kth(h) - 1e-3)), 1e-3),
    "half of the threshold": (_block(lambda h: _kept(h, 0.5 * _kth(h))),),
    "a mean, if that is less": (
        _block(lambda h: _kept(h, jnp.minimum(_kth(h), h.mean(-1, keepdims=True) + 2 * h.std())))
    ,),
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NOT_ALONE)
def test_it_stays_dense(name):
    fn, *given = NOT_ALONE[name]
    x = X * given.pop() if given and isinstance(given[0], int | float) else X
    step = hire.transform(fn, on_miss="ignore")
    packed = step.pack(PARAMS, x, *given)
    assert [site.status for site in step.plan(packed, x, *given).sites] == ["dense"]
    want = fn(PARAMS, x, *given)
    np.testing.assert_allclose(
        step(packed, x, *given), want, atol=2e-5 * np.abs(want).max(), rtol=1e-4
    )


ALONE = {
    "a threshold": (_block(lambda h: _kept(h, _kth(h))),),
    "behind a relu": (_block(_of_relu),),
    "sorted": (_block(lambda h: _kept(h, jnp.sort(h, -1)[..., -K][..., None])),),
    "a scale of the result": (_block(lambda h, s: _kept(h, _kth(h)) * s), jnp.float32(-3)),
    "a scale for each token": (_block(lambda h, s: _kept(h, _kth(h)) * s), X[:, :1]),
    "gated": (_gated,),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ALONE)
def test_it_is_rewritten(name, dtype):
    fn, *given = ALONE[name]
    params, x, given = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, X, given))
    (site,) = hire.transform(fn, on_miss="ignore").plan(params, x, *given).sites
    assert site.rule == hire.FFN(k=K, group=1)

"""A gradient of what is rewritten is not silently another one."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire

D, F = 32, 128
X = jax.random.normal(jax.random.key(0), (1, D))
UP, DOWN = jax.random.normal(jax.random.key(1), (2, D, F))
PARAMS = {"up": UP, "down": DOWN.T}
RULE = hire.FFN(k=0.25, force=True)


def block(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def said(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if 'mode="exact"' in str(w.message)]


def forward(fn):
    return lambda x: jax.jvp(fn, (x,), (x,))


@pytest.mark.parametrize("derivative", [jax.grad, forward])
@pytest.mark.parametrize("compiled", [True, False])
def test_hire_warns_once(derivative, compiled):
    step = hire.transform(block, RULE)
    packed = step.pack(PARAMS, X)
    run = jax.jit(step) if compiled else step

    def twice():
        for x in (X, 2 * X):
            derivative(lambda x: run(packed, x).sum())(x)

    assert len(said(twice)) == 1


def test_raw_weights():
    step = hire.transform(block, RULE)
    assert len(said(lambda: jax.grad(lambda p: step(p, X).sum())(PARAMS))) == 1


def test_where_nothing_is_wrong_nothing_is_said():
    exact = hire.transform(block, RULE, mode="exact")
    assert not said(lambda: jax.grad(lambda p: exact(p, X).sum())(PARAMS))
    step = hire.transform(block, RULE)
    packed = step.pack(PARAMS, X)
    assert not said(lambda: jax.vmap(step, (None, 0))(packed, jnp.stack([X, X])))
    prompt = jnp.ones((64, D))
    want = jax.grad(lambda x: exact(PARAMS, x).sum())(prompt)
    assert not said(lambda: jax.grad(lambda x: step(packed, x).sum())(prompt))
    got = jax.grad(lambda x: step(packed, x).sum())(prompt)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_arguments_are_handed_on_as_they_are():
    def with_cache(params, x, cache):
        return block(params, x), cache

    step = hire.transform(with_cache, RULE)
    packed = step.pack(PARAMS, X, jnp.ones(3))
    jaxpr = jax.make_jaxpr(step)(packed, X, jnp.ones(3)).jaxpr
    assert jaxpr.outvars[1] is jaxpr.invars[-1]

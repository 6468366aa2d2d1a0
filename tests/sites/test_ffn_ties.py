"""A block that keeps its greatest neurons by a threshold keeps all that are equal at it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import hire_rewrite as hire

D, F, K = 32, 256, 8


def kept(h):
    return jnp.where(h >= lax.top_k(h, K)[0][..., -1:], h, 0)


def block(params, x):
    return kept(jax.nn.relu(x @ params["up"])) @ params["down"]


def params_of(dtype, alike):
    """Weights of which the neurons come in so many that are alike."""
    rng = np.random.default_rng(0)
    up = np.repeat(rng.standard_normal((D, -(-F // alike)), np.float32), alike, axis=1)[:, :F]
    down = rng.standard_normal((F, D), np.float32)
    return {"up": jnp.asarray(up, dtype), "down": jnp.asarray(down, dtype)}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("candidates", [40, F])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_of_them_are_kept(dtype, tokens, candidates):
    params = params_of(dtype, alike=3)  # of eight two threes, and a third one at the threshold
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, D)), dtype)
    hidden = kept(jax.nn.relu(x @ params["up"]))
    assert ((hidden != 0).sum(-1) > K).all()
    rule = hire.FFN(k=K, group=1, candidates=candidates, predictor=hire.Quantized(8), force=True)
    step = hire.transform(block, rule)
    packed = step.pack(params, x)
    assert step.plan(packed, x).rewritten
    tight = {"rtol": 1e-5, "atol": 1e-4} if dtype == "float32" else {"rtol": 0.02, "atol": 0.15}
    for run in (step, hire.transform(block, rule, mode="exact")):
        got = run(packed, x)
        np.testing.assert_allclose(
            np.asarray(got, np.float32), np.asarray(block(params, x), np.float32), **tight
        )


def test_fewer_that_are_asked_for_are_as_many_as_that():
    params = params_of("float32", alike=3)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, D)), jnp.float32)
    step = hire.transform(block, hire.FFN(k=4, group=1, candidates=F, force=True))
    h = kept(jax.nn.relu(x @ params["up"]))[0]
    best = lax.top_k(h, 4)[1]
    want = h[best] @ params["down"][best]
    np.testing.assert_allclose(step(step.pack(params, x), x)[0], want, rtol=1e-4, atol=1e-4)

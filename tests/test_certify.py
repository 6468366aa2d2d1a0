"""Certified heads from the outside: greedy tokens are the dense function's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite import HireRewriteError
from tests.cases import Oracle, inputs, optimized

V, D = 512, 64
PARAMS = {"embed": inputs(V, D, seed=1), "w": inputs(D, D, seed=2) / 8}
HEAD = hire.Head(k=8, candidates=24, min_width=100, certify=True, force=True)


def logits_of(params, x):
    return jnp.tanh(x @ params["w"]) @ params["embed"].T


def test_greedy_decoding_is_the_dense_one():
    """Also where two rows are equal, and where the greatest is far behind in the guesses."""

    def generate(params, token):
        def step(token, _):
            logits = logits_of(params, params["embed"][token] / 4)
            return logits.argmax(-1), logits.argmax(-1)

        return jax.lax.scan(step, token, length=40)[1]

    twins = PARAMS | {"embed": PARAMS["embed"].at[1::7].set(PARAMS["embed"][0::7][: V // 7])}
    token = jnp.arange(16)
    for params in (PARAMS, twins):
        step = hire.transform(generate, HEAD)
        packed = step.pack(params, token)
        got, want = optimized(step)(packed, token), optimized(generate)(params, token)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("certify", [1, 3])
def test_the_share_proved_is_reported(certify):
    rule = hire.Head(**vars(HEAD) | {"certify": certify})
    step = hire.transform(logits_of, rule)
    x = inputs(64, D, seed=3)
    packed = step.pack(PARAMS, x)
    report = step.evaluate(packed, [(x,)])
    assert report.sites[0].proved > 0.9
    assert f"{certify} proved" in step.plan(PARAMS, x[:1]).sites[0].reason
    got, want = step(packed, x), logits_of(PARAMS, x)
    np.testing.assert_array_equal(jax.lax.top_k(got, certify)[1], jax.lax.top_k(want, certify)[1])


def test_nothing_proved_runs_dense():
    same = PARAMS | {"embed": jnp.ones((V, D))}
    step = hire.transform(logits_of, HEAD)
    x = inputs(8, D, seed=3)
    packed = step.pack(same, x)
    assert step.evaluate(packed, [(x,)]).sites[0].proved == 0.0
    np.testing.assert_allclose(step(packed, x), logits_of(same, x), rtol=1e-5)


def test_what_cannot_be_certified():
    def penalized(params, x):
        logits = logits_of(params, x)
        return jnp.where(logits < 0, logits * 1.2, logits / 1.2)

    x = inputs(2, D)
    (site,) = hire.inspect(penalized, PARAMS, x, rules=[HEAD]).sites
    assert site.status == "dense"
    assert "bound" in site.reason
    half, narrow = jax.tree.map(lambda a: a.astype(jnp.float16), PARAMS), x.astype(jnp.float16)

    def mixed(params, x):
        embed = params["embed"]
        return jax.lax.dot_general(x, embed, (((1,), (1,)), ((), ())), None, jnp.float32)

    for fn, params in ((logits_of, half), (mixed, PARAMS)):
        (site,) = hire.inspect(fn, params, narrow, rules=[HEAD]).sites
        assert site.status == "dense"
        assert "float32 and bfloat16" in site.reason
    for change, message in (
        ({"predictor": Oracle()}, "params/embed: certify"),
        ({"predictor": hire.LowRank(8)}, "certify"),
        ({"certify": 9}, "certify=9"),
    ):
        with pytest.raises(HireRewriteError, match=message):
            hire.inspect(logits_of, PARAMS, x, rules=[hire.Head(**vars(HEAD) | change)])
    with pytest.raises(HireRewriteError, match="certify=-1"):
        hire.Head(certify=-1)

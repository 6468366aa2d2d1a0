"""The checks that the package offers for other suites: that they pass, and that they can fail."""

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from hire_rewrite import testing

D, HIDDEN, VOCABULARY = 64, 128, 4096
HEAD = hire.Head(k=64, force=True)


def model(params, token):
    x = params["embed"][token]
    x = x + (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]
    return x @ params["embed"].T


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"gate": (D, HIDDEN), "up": (D, HIDDEN), "down": (HIDDEN, D), "embed": (VOCABULARY, D)}
    return {
        name: jax.random.normal(key, shape) / 8
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


TOKEN = jnp.arange(3)


def test_rewrites(params):
    step = hire.transform(model, HEAD)
    testing.assert_rewrites(step, params, TOKEN, head=1)
    with pytest.raises(AssertionError, match="2 head"):
        testing.assert_rewrites(step, params, TOKEN, head=2)
    with pytest.raises(AssertionError, match="silu"):  # the plan says why
        testing.assert_rewrites(step, params, TOKEN, head=1, ffn=1)
    with pytest.raises(AssertionError, match="not a kind"):
        testing.assert_rewrites(step, params, TOKEN, heads=1)


def test_same_at_full_budget(params):
    testing.assert_same_at_full_budget(model, params, TOKEN)
    testing.assert_same_at_full_budget(
        lambda token, params: {"logits": model(params, token)}, TOKEN, params, weights=1
    )
    few = [hire.FFN(k=4, candidates=4, group=1, force=True)]
    with pytest.raises(AssertionError, match="result differs"):
        testing.assert_same_at_full_budget(model, params, TOKEN, rules=few)
    with pytest.raises(AssertionError, match="nothing is rewritten"):
        testing.assert_same_at_full_budget(lambda w, x: x * w, jnp.ones(3), jnp.ones(3))


def test_recall(params):
    step = hire.transform(model, hire.Head(k=64, candidates=512, force=True))
    packed = step.pack(params, TOKEN)
    assert testing.assert_recall(step, packed, [(TOKEN,)]).sites[0].kind == "head"
    bad = hire.transform(
        model, hire.Head(k=64, candidates=64, predictor=hire.LowRank(1), force=True)
    )
    with pytest.raises(AssertionError, match="params/embed"):
        testing.assert_recall(bad, bad.pack(params, TOKEN, calibration=[(TOKEN,)]), [(TOKEN,)])


def test_no_change_of_meaning(params):
    testing.assert_no_change_of_meaning(hire.transform(model, HEAD), params, [(TOKEN,)])
    ffn = hire.FFN(k=0.02, candidates=0.02, force=True)
    params["down"] *= 100
    with pytest.raises(AssertionError, match="KL above"):
        testing.assert_no_change_of_meaning(hire.transform(model, ffn, HEAD), params, [(TOKEN,)])
    with pytest.raises(AssertionError, match="no vocabulary head"):
        testing.assert_no_change_of_meaning(
            hire.transform(lambda p, t: p["embed"][t] @ p["up"], hire.Linear(force=True)),
            params,
            [(TOKEN,)],
        )


def test_a_change_of_meaning_in_decoding_is_found_with_many_tokens(params):
    """Called with so many tokens the product would be dense."""
    rule = hire.Linear(0.05, encoding=hire.Blocks(4), path="embed", lookups=False, force=True)
    step = hire.transform(model, rule)
    many = jnp.arange(64, dtype=TOKEN.dtype)
    with pytest.raises(AssertionError, match="KL above"):
        testing.assert_no_change_of_meaning(step, params, [(many,)], kl=1e-6)

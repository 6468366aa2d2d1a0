"""Reasons name what a user can change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire_rewrite as hire
from hire_rewrite.patterns.refusal import Refusal
from hire_rewrite.plan import grouped_rejections

D, F = 64, 256
X = jnp.ones((1, D))
KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {"up": jax.random.normal(KEYS[0], (D, F)), "down": jax.random.normal(KEYS[1], (F, D))}
RULE = hire.FFN(k=8, force=True)
NWC = ("NWC", "WIO", "NWC")


def reasons(fn, *args):
    plan = hire.inspect(fn, *args, rules=[RULE])
    assert not plan.sites
    return {rejection.name: rejection.reason for rejection in plan.rejected}


def test_a_normalization_between_two_layers():
    def fn(params, x):
        h = jax.nn.relu(x @ params["up"])
        h = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
        return h @ params["down"]

    found = reasons(fn, PARAMS, X)
    assert "normalization" in found["params/down"]
    assert "test_reasons.py:" in found["params/down"]
    assert "normalization" in found["params/up"]  # it is not only too narrow for a vocabulary


@pytest.mark.parametrize("looped", [False, True])
def test_a_layer_that_is_an_argument_of_its_own(looped):
    def fn(params, x, delta):
        h = jax.lax.fori_loop(0, 3, lambda _, x: x, x) @ delta if looped else x @ delta
        return jax.nn.relu(h) @ params["down"]

    found = reasons(fn, PARAMS, X, PARAMS["up"])
    assert "delta" in found["params/down"]
    assert "argument 2" in found["params/down"]


def test_an_adapter_of_a_scan():
    def fn(params, x, delta):
        def layer(x, w):
            return jax.nn.relu(x @ w[0]) @ w[1], None

        return jax.lax.scan(layer, x, (delta, params["down"]))[0]

    stacked = {"down": jnp.stack([PARAMS["down"]] * 2)}
    found = reasons(fn, stacked, X, jnp.stack([PARAMS["up"]] * 2))
    assert "argument 2" in found["params/down"]


def block(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def test_a_packed_that_was_restored_to_a_dict():
    step = hire.transform(block, RULE)
    packed = step.pack(PARAMS, X)
    with pytest.raises(hire.HireRewriteError, match="target"):
        step({"weights": packed.weights, "sites": packed.sites}, X)
    with pytest.raises(hire.HireRewriteError, match="argument 1 is a Packed"):
        step(PARAMS, packed)


def test_rules_that_a_packed_was_not_made_for():
    packed = hire.transform(block, RULE).pack(PARAMS, X)
    other = hire.transform(block, RULE.replace(group=16, k=16))
    with pytest.raises(hire.HireRewriteError, match=r"group=8.*group=16"):
        other(packed, X)


def test_a_convolution_behind_a_layer():
    def fn(params, x):
        h = jax.nn.relu(x @ params["up"])
        return jax.lax.conv_general_dilated(h, params["kernel"], (1,), "SAME", None, None, NWC)

    params = {"up": PARAMS["up"], "kernel": jnp.ones((3, F, D))}
    found = reasons(fn, params, jnp.ones((1, 8, D)))
    assert "convolution" in found["params/kernel"]
    assert "params/up" in found


def attention(params, x, keys, values):
    """One layer of decoding, 4 heads: products of a cache between linear layers."""
    y = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    q, k, v = ((y @ params[name]).reshape(1, 4, D // 4) for name in "qkv")
    keys, values = keys.at[:, 3].set(k), values.at[:, 3].set(v)
    scores = jax.nn.softmax(jnp.einsum("bhd,bthd->bht", q, keys))
    return x + jnp.einsum("bht,bthd->bhd", scores, values).reshape(1, D) @ params["o"]


@pytest.mark.parametrize("rule", [RULE, hire.Head()])
def test_layers_that_look_like_no_site_say_which_rule_takes_them(rule):
    """Not why they are neither a vocabulary nor a part of a block; and all in one row."""
    layers = [{name: jnp.ones((D, D)) for name in "qkvo"} for _ in range(12)]

    def fn(params, x, keys, values):
        for layer in params:
            x = attention(layer, x, keys, values)
        return x

    cache = jnp.ones((1, 8, 4, D // 4))
    plan = hire.inspect(fn, layers, X, cache, cache, rules=[rule])
    assert len(plan.rejected) == 48
    assert not any(rejection.near for rejection in plan.rejected)
    assert {"Linear(encoding=...)" in rejection.reason for rejection in plan.rejected} == {True}
    ((name, members),) = grouped_rejections(plan.rejected)
    assert len(members) == 48
    assert "{0..11}" in name
    plan = hire.inspect(fn, layers, X, cache, cache)
    assert not plan.rejected
    assert [site.kind for site in plan.sites] == ["linear"] * 48


def test_layers_that_look_like_a_site_say_what_stopped_the_match():
    def fn(params, x):
        h = jax.nn.relu(x @ params["up"])
        h = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
        y = attention(params, h @ params["down"], *[jnp.ones((1, 8, 4, D // 4))] * 2)
        return y @ params["bytes"]

    params = PARAMS | {name: jnp.ones((D, D)) for name in "qkvo"} | {"bytes": jnp.ones((D, F))}
    for rules in ((), (RULE,)):
        plan = hire.inspect(fn, params, X, rules=rules)
        near = {rejection.name for rejection in plan.rejected if rejection.near}
        assert near == {"params/up", "params/down", "params/bytes"}
    (byte,) = (r.reason for r in plan.rejected if r.name == "params/bytes")
    assert "min_width" in byte


def test_reasons_with_numbers_of_the_name_are_alike():
    """The shape in a reason is another thing than the number of a layer."""
    reason = "its input axis is split by a reshape from (1, 8, 64); and p/{}/up is behind it"
    layers = [
        hire.Rejection(f"p/{i}/o", (D, D), reason.format(i), 1, "model.py:3", Refusal.TAKEN)
        for i in range(9)
    ]
    ((name, members),) = grouped_rejections(layers)
    assert (name, len(members)) == ("p/{0..8}/o", 9)


@pytest.mark.parametrize("rules", [(), (hire.Linear(encoding=hire.Blocks(8), force=True),)])
def test_a_loop_that_never_runs(rules):
    def fn(layers, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    layers, x = jnp.zeros((0, 32, 32)), jnp.ones((1, 32))
    step = hire.transform(fn, *rules, on_miss="ignore")
    np.testing.assert_array_equal(step(step.pack(layers, x), x), x)
    (site,) = step.plan(layers, x).sites
    assert "never runs" in site.reason

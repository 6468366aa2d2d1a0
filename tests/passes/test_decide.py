"""Which rule decides about a site, and what it decides: all in the plan."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from tests.cases import D, F, Oracle, T, V, inputs, packed, plan_of, rand
from tests.cases_ffn import GATED, PLAIN, STACK, gated, plain
from tests.cases_head import EMBED

WIDE = {"up": rand(D, 4096), "down": rand(4096, D)}
VOCABULARY = rand(5000, D)


def model(params, x):
    x = plain()(params["relu"], x)
    x = gated()(params["silu"], x)
    return x @ params["embed"].T


PARAMS = {"relu": WIDE, "silu": WIDE | {"gate": WIDE["up"]}, "embed": VOCABULARY}


def sites(*rules, params=None, tokens=1, fn=model):
    plan = plan_of(fn, PARAMS if params is None else params, inputs(tokens, D), rules=rules)
    return {site.name.removeprefix("params/"): site for site in plan.sites}


def only(*rules, **kwargs):
    (site,) = sites(*rules, **kwargs).values()
    return site


def packs(*rules, fn=model, params=None, tokens=1):
    """The names under which sites are packed."""
    shapes = jax.eval_shape(lambda: PARAMS if params is None else params)
    return set(packed(hire.transform(fn, *rules), shapes, inputs(tokens, D)).sites)


def test_default_rules():
    found = sites()
    assert found["embed"].rule == hire.Head()
    assert found["relu"].rule == hire.FFN(k="positive")  # which loses nothing
    # A top-k would make another model of it.
    assert (found["silu"].rule, found["silu"].status) == (None, "dense")


def test_a_given_rule_applies_to_every_block():
    found = sites(hire.FFN(k=0.05, force=True))
    assert found["relu"].rule == found["silu"].rule == hire.FFN(k=0.05, force=True)
    assert (found["relu"].status, found["silu"].status) == ("rewritten", "rewritten")
    assert (found["embed"].rule, found["embed"].status) == (None, "dense")


def test_first_rule_that_fits_decides():
    special, rest = hire.FFN(k=7, path="silu"), hire.FFN(k=9)
    found = sites(special, rest, hire.FFN(k=11))
    assert found["silu"].rule is special
    assert found["relu"].rule is rest
    found = sites(rest, special)
    assert found["silu"].rule is rest


def test_unused_rules():
    rules = hire.FFN(k=1, path="none"), hire.FFN(k=1), hire.Head(min_width=10**6)
    assert hire.inspect(model, PARAMS, inputs(1, D), rules=rules).unused_rules == rules[::2]
    assert hire.inspect(model, PARAMS, inputs(1, D)).unused_rules == ()


def test_max_tokens():
    rule = hire.FFN(k=0.01, predictor=Oracle(), max_tokens=2)
    assert sites(rule, tokens=2)["relu"].status == "rewritten"
    site = sites(rule, tokens=3)["relu"]
    assert site.status == "dense"
    assert "max_tokens" in site.reason
    assert site.bytes_after == site.bytes_before
    assert packs(rule, tokens=3) == {"params/relu", "params/silu"}


def test_what_does_not_pay_stays_dense():
    rule = hire.FFN(k=1.0, predictor=hire.Quantized(bits=8))
    site = sites(rule)["relu"]
    assert (site.status, site.rule) == ("dense", rule)
    assert site.expected < 1.0
    assert packs(rule) == set()
    forced = dataclasses.replace(rule, force=True)
    assert sites(forced)["relu"].status == "rewritten"
    assert sites(forced)["relu"].expected == site.expected


def test_what_pays_for_one_token_is_packed():
    rule = hire.FFN(k=0.2, candidates=0.2, predictor=Oracle(), max_tokens=None, path="relu")
    assert sites(rule, tokens=6)["relu"].status == "dense"
    assert packs(rule, tokens=6) == {"params/relu"}


def test_a_packed_does_not_change_the_reason_of_what_does_not_pay():
    """Packing again would not pack it either; what another function packed is another matter."""
    costly = hire.FFN(k=1.0, predictor=hire.Quantized(bits=8))
    cheap = hire.FFN(k=0.01, predictor=Oracle(), path="relu")

    def reason(step, weights):
        plan = step.plan(weights, inputs(1, D))
        return next(site.reason for site in plan.sites if site.name == "params/relu")

    every = [(costly, hire.Head()), (cheap, hire.Head()), (hire.Head(),)]
    steps = [hire.transform(model, *rules, on_miss="ignore") for rules in every]
    own, other = (packed(steps[i], PARAMS, inputs(1, D)) for i in (0, 2))
    assert reason(steps[0], own) == reason(steps[0], other) == reason(steps[0], PARAMS)
    assert "Packed" in reason(steps[1], other)
    assert "Packed" not in reason(steps[1], PARAMS)


@pytest.mark.parametrize(
    ("rule", "k", "candidates"),
    [
        (hire.FFN(k=0.05), 26, 52),  # groups of 8, rounded up
        (hire.FFN(k=8), 1, 2),
        (hire.FFN(k=9), 2, 3),
        (hire.FFN(k=8, candidates=0.5), 1, 256),
        (hire.FFN(k=1.0), 512, 512),
    ],
)
def test_sizes_of_a_block(rule, k, candidates):
    """First rows of all candidates, and second ones of the k, are read."""
    site = sites(dataclasses.replace(rule, predictor=Oracle(), force=True))["relu"]
    assert site.bytes_after == 8 * (candidates + k) * D * 4


@pytest.mark.parametrize(
    ("rule", "candidates"),
    [
        (hire.Head(), 256),
        (hire.Head(k=1), 256),
        (hire.Head(k=100), 400),
        (hire.Head(k=2000), 5000),
        (hire.Head(k=0.01, candidates=0.1), 500),
    ],
)
def test_sizes_of_a_head(rule, candidates):
    site = sites(dataclasses.replace(rule, predictor=Oracle(), force=True))["embed"]
    assert site.bytes_after == candidates * D * 4


def test_a_group_that_does_not_divide_the_width():
    params = {"up": rand(D, 36), "down": rand(36, D)}
    rule = hire.FFN(k=4, candidates=4, group=8, predictor=Oracle(), force=True)
    site = only(rule, fn=plain(), params=params)  # groups of 4
    assert site.bytes_after == (4 + 4) * D * 4


@pytest.mark.parametrize(
    ("rule", "site", "argument"),
    [
        (hire.FFN(k=5000), "params/relu", "k=5000"),
        (hire.FFN(k=0.5, candidates=100), "params/relu", "candidates=100"),
        (hire.Head(k=64, candidates=0.001), "params/embed", "candidates=0.001"),
        (hire.FFN(k=1, predictor=hire.LowRank(rank=100)), "params/relu", "rank=100"),
    ],
)
def test_bad_sizes_name_the_site(rule, site, argument):
    with pytest.raises(hire.HireRewriteError, match=f"{site}: .*{argument}"):
        sites(rule)


def test_sites_with_the_same_weights_are_packed_once():
    def fn(p, x):
        x = plain()(p, plain()(p, x))
        y = jax.lax.scan(lambda c, _: (plain()(p, c), None), x, length=2)[0]
        return y, gated()(p, x)

    rule = hire.FFN(k=8, force=True)
    assert len(sites(rule, fn=fn, params=GATED)) == 4
    assert len(packs(rule, fn=fn, params=GATED)) == 2
    # Other sizes, other rows.
    assert len(packs(hire.FFN(k=16, path="#1", force=True), rule, fn=fn, params=GATED)) == 3


# Bytes


def test_dense_bytes():
    assert only(fn=plain(), params=PLAIN).bytes_before == 2 * D * F * 4
    assert only(fn=gated(), params=GATED).bytes_before == 3 * D * F * 4
    layers = lambda p, x: jax.lax.scan(lambda c, w: (plain()(w, c), None), x, p)[0]  # noqa: E731
    assert only(fn=layers, params=STACK).bytes_before == 4 * 2 * D * F * 4
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PLAIN)
    widen = lambda p, x: plain()(jax.tree.map(lambda w: w.astype(jnp.float32), p), x)  # noqa: E731
    assert only(fn=widen, params=narrow).bytes_before == 2 * D * F * 2
    fused = {"fused": rand(D, 2 * F), "down": rand(F, D)}
    halves = lambda p, x: (lambda h: jax.nn.silu(h[:, :F]) * h[:, F:])(x @ p["fused"]) @ p["down"]  # noqa: E731
    assert only(fn=halves, params=fused).bytes_before == 3 * D * F * 4
    head = only(hire.Head(min_width=100), fn=lambda p, x: x @ p["e"].T, params={"e": EMBED})
    assert head.bytes_before == D * V * 4


@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_bytes_of_a_rewritten_block(tokens):
    """Of the candidates of all tokens; of the whole block where these may be all."""
    rule = hire.FFN(k=8, candidates=16, predictor=Oracle(), max_tokens=None, force=True)
    site = only(rule, fn=gated(), params=GATED, tokens=tokens)
    first, second = min(F, 16 * tokens), min(F, 8 * tokens)
    assert site.bytes_after == (2 * first + second) * D * 4


@pytest.mark.parametrize("tokens", [1, T, 100])
def test_bytes_of_a_rewritten_head(tokens):
    rule = hire.Head(k=4, candidates=16, predictor=Oracle(), min_width=100)
    params, fn = {"e": EMBED}, lambda p, x: x @ p["e"].T
    forced = only(dataclasses.replace(rule, force=True), fn=fn, params=params, tokens=tokens)
    assert forced.bytes_after == min(V, 16 * tokens) * D * 4
    site = only(rule, fn=fn, params=params, tokens=tokens)
    assert (site.status == "rewritten") == (16 * tokens < V)


def test_a_block_that_selects_has_its_own_k():
    """By default, and the same for any number of tokens, since prefill and decode share rows."""

    def top_8(h):
        return jnp.where(h >= jax.lax.top_k(h, 8)[0][..., -1:], h, 0)

    (rule,) = {only(fn=plain(top_8), params=PLAIN, tokens=n).rule for n in (1, 2, 50)}
    assert (rule.group, rule.k) == (1, 8)


def test_what_is_selected_by_something_else_than_a_gate_stays_dense():
    """Candidates beyond the k greatest guesses are those of the greatest gates."""

    def kept(by, h):
        return jnp.where(by >= jax.lax.top_k(by, 8)[0][..., -1:], h, 0)

    for select in (
        lambda h: kept(jnp.abs(h), h),
        lambda h: kept(-jnp.abs(h), h),
        lambda h: kept(jax.nn.relu(h), h),  # all of them, where fewer than 8 are positive
        lambda h: kept(h + jnp.sin(jnp.arange(h.shape[-1])), jax.nn.relu(h)),
        lambda h: kept(jax.nn.gelu(h), jax.nn.gelu(h)),
    ):
        site = only(fn=plain(select), params=PLAIN, tokens=1)
        assert (site.status, site.rule) == ("dense", None)
    assert only(fn=plain(lambda h: kept(h, jax.nn.gelu(h))), params=PLAIN, tokens=1).rule.k == 8


def test_how_many_a_statistic_selects_nobody_knows():
    """The data say: no k is right for all of them."""

    def above(h):
        return jax.nn.relu(h - (h.mean(-1, keepdims=True) + h.std(-1, keepdims=True)))

    site = only(fn=plain(above), params=PLAIN, tokens=1)
    assert (site.status, site.rule) == ("dense", None)
    assert "FFN(k=...) does" in site.reason

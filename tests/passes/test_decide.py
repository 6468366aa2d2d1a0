"""Which rule decides about a site, and what it decides."""

import math

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.estimate import dense_bytes, estimate
from hire_rewrite.graph.trace import trace
from hire_rewrite.passes.decide import decide
from hire_rewrite.passes.detect import detect
from tests.cases import D, F, Oracle, T, V, inputs, plan_of, rand
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


def decisions(*rules, fn=model, params=None, tokens=1):
    args = (PARAMS if params is None else params, inputs(tokens, D))
    return decide(detect(trace(fn, args, {}, (0,)), rules), rules, {})


def test_default_rules():
    found = sites()
    assert found["embed"].rule == hire.Head()
    for name in ("relu", "silu"):  # a top-k would make another model of either
        assert (found[name].rule, found[name].status) == (None, "dense")
        assert "ask with FFN(k=" in found[name].reason


def test_a_given_rule_applies_to_every_block():
    found = sites(hire.FFN(k=0.05, force=True))
    assert found["relu"].rule == found["silu"].rule == hire.FFN(k=0.05, force=True)
    assert (found["relu"].status, found["silu"].status) == ("rewritten", "rewritten")
    assert found["embed"].rule is None
    assert "Head(k=...)" in found["embed"].reason


def test_first_rule_that_fits_decides():
    special, rest = hire.FFN(k=7, path="silu"), hire.FFN(k=9)
    found = sites(special, rest, hire.FFN(k=11))
    assert found["silu"].rule is special
    assert found["relu"].rule is rest
    found = sites(rest, special)
    assert found["silu"].rule is rest


def test_unused_rules():
    plan, _ = decisions(hire.FFN(k=1, path="none"), hire.FFN(k=1), hire.Head(min_width=10**6))
    assert plan.unused_rules == (hire.FFN(k=1, path="none"), hire.Head(min_width=10**6))
    assert decisions()[0].unused_rules == ()


def test_max_tokens():
    rule = hire.FFN(k=0.01, predictor=Oracle(), max_tokens=2)
    assert sites(rule, tokens=2)["relu"].status == "rewritten"
    site = sites(rule, tokens=3)["relu"]
    assert site.status == "dense"
    assert "3 tokens are more than max_tokens=2" in site.reason
    assert site.bytes_after == site.bytes_before
    found = decisions(rule, tokens=3)[1][0]
    assert (found.packs, found.rewritten) == (True, False)


def test_what_does_not_pay_stays_dense():
    rule = hire.FFN(k=1.0, predictor=hire.Quantized(bits=8))
    site = sites(rule)["relu"]
    assert (site.status, site.rule) == ("dense", rule)
    assert "force=True" in site.reason
    assert not decisions(rule)[1][0].packs
    forced = hire.FFN(k=1.0, predictor=hire.Quantized(bits=8), force=True)
    assert sites(forced)["relu"].status == "rewritten"


def test_what_pays_for_one_token_is_packed():
    rule = hire.FFN(k=0.2, candidates=0.2, predictor=Oracle(), max_tokens=None)
    found = decisions(rule, tokens=6)[1][0]
    assert (found.row.status, found.packs) == ("dense", True)
    assert "the same meaning in dense arithmetic" in found.row.reason


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
    spec = decisions(rule)[1][0].op.spec
    assert (spec.width, spec.group, spec.groups) == (4096, 8, 512)
    assert (spec.k_groups, spec.candidate_groups) == (k, candidates)


@pytest.mark.parametrize(
    ("rule", "k", "candidates"),
    [
        (hire.Head(), 64, 256),
        (hire.Head(k=1), 1, 256),
        (hire.Head(k=100), 100, 400),
        (hire.Head(k=2000), 2000, 5000),
        (hire.Head(k=0.01, candidates=0.1), 50, 500),
    ],
)
def test_sizes_of_a_head(rule, k, candidates):
    spec = decisions(rule)[1][-1].op.spec
    assert (spec.width, spec.k, spec.candidates) == (5000, k, candidates)


def test_a_group_that_does_not_divide_the_width():
    params = {"up": rand(D, 36), "down": rand(36, D)}
    spec = decisions(hire.FFN(k=4, group=8, force=True), fn=plain(), params=params)[1][0].op.spec
    assert (spec.group, spec.groups, spec.k_groups) == (math.gcd(8, 36), 9, 1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (hire.FFN(k=5000), "params/relu: k=5000 is more than the width 4096"),
        (hire.FFN(k=0.5, candidates=100), "params/relu: candidates=100 are 100 rows, less than"),
        (hire.Head(k=64, candidates=0.001), "params/embed: candidates=0.001 are 5 rows"),
        (hire.FFN(k=1, predictor=hire.LowRank(rank=100)), "params/relu: LowRank: rank=100 is more"),
    ],
)
def test_bad_sizes_name_the_site(rule, message):
    with pytest.raises(hire.HireRewriteError, match=message.replace("(", r"\(")):
        sites(rule)


def test_sparse_and_gate_reach_the_operations():
    relu, silu, _ = decisions(hire.FFN(k=1))[1]
    assert (relu.op.spec.sparse, relu.op.spec.projections) == (True, 1)
    assert (silu.op.spec.sparse, silu.op.spec.projections) == (False, 2)


def test_dtypes_reach_the_operations():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PLAIN)

    def fn(p, x):
        h = jnp.matmul(x.astype(jnp.bfloat16), p["up"], preferred_element_type=jnp.float32)
        h = jax.nn.relu(h).astype(jnp.bfloat16)
        return jnp.matmul(h, p["down"], precision="highest")

    spec = decisions(hire.FFN(k=8, force=True), fn=fn, params=params)[1][0].op.spec
    assert (spec.up_dtype, spec.down_dtype, spec.compute_dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.bfloat16,
    )


def test_sites_with_the_same_weights_share_a_state():
    def fn(p, x):
        x = plain()(p, plain()(p, x))
        y = jax.lax.scan(lambda c, _: (plain()(p, c), None), x, length=2)[0]
        return y, gated()(p, x)

    found = decisions(hire.FFN(k=8, force=True), fn=fn, params=GATED)[1]
    names = {decision.name for decision in found}
    assert len(names) == 4
    states = [decision.packed_name for decision in found]
    assert len(set(states)) == 2
    # Other sizes, other rows.
    rules = hire.FFN(k=16, path="#1", force=True), hire.FFN(k=8, force=True)
    states = [decision.packed_name for decision in decisions(*rules, fn=fn, params=GATED)[1]]
    assert len(set(states)) == 3


# Bytes


def found_site(fn, params, tokens=1):
    traced = trace(fn, (params, inputs(tokens, D)), {}, (0,))
    (site,) = detect(traced, [hire.Head(min_width=100)]).sites
    return site


def test_dense_bytes():
    assert dense_bytes(found_site(plain(), PLAIN)) == 2 * D * F * 4
    assert dense_bytes(found_site(gated(), GATED)) == 3 * D * F * 4
    layers = lambda p, x: jax.lax.scan(lambda c, w: (plain()(w, c), None), x, p)[0]  # noqa: E731
    assert dense_bytes(found_site(layers, STACK)) == 4 * 2 * D * F * 4
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PLAIN)
    widen = lambda p, x: plain()(jax.tree.map(lambda w: w.astype(jnp.float32), p), x)  # noqa: E731
    assert dense_bytes(found_site(widen, narrow)) == 2 * D * F * 2
    fused = {"fused": rand(D, 2 * F), "down": rand(F, D)}
    halves = lambda p, x: (lambda h: jax.nn.silu(h[:, :F]) * h[:, F:])(x @ p["fused"]) @ p["down"]  # noqa: E731
    assert dense_bytes(found_site(halves, fused)) == 3 * D * F * 4
    assert dense_bytes(found_site(lambda p, x: x @ p["e"].T, {"e": EMBED})) == D * V * 4


def test_bytes_of_a_rewritten_block():
    """The predictor, the candidates' first rows, and the second rows of the k that are kept."""
    rule = hire.FFN(k=8, candidates=16, predictor=Oracle(), force=True)
    for tokens in (1, 3, 100):
        (decision,) = decisions(rule, fn=gated(), params=GATED, tokens=tokens)[1]
        got = estimate(decision.op, tokens, machines.current())
        first, second = min(F, 16 * tokens), min(F, 8 * tokens)
        assert got.before == 3 * D * F * 4
        assert got.after == (2 * first + second) * D * 4


def test_bytes_of_a_rewritten_head():
    rule = hire.Head(k=4, candidates=16, predictor=Oracle(), min_width=100, force=True)
    fn = lambda p, x: x @ p["e"].T  # noqa: E731
    for tokens in (1, T, 100):
        (decision,) = decisions(rule, fn=fn, params={"e": EMBED}, tokens=tokens)[1]
        got = estimate(decision.op, tokens, machines.current())
        assert got.after == min(V, 16 * tokens) * D * 4
        assert got.pays == (16 * tokens < V)


def test_a_block_that_selects_has_its_own_k():
    """By default, and the same for any number of tokens, since prefill and decode share rows."""

    def top_8(h):
        return jnp.where(h >= jax.lax.top_k(h, 8)[0][..., -1:], h, 0)

    def above(h):
        return jax.nn.relu(h - (h.mean(-1, keepdims=True) + h.std(-1, keepdims=True)))

    for select, least, most in ((top_8, 8, 8), (above, 10, 30)):
        ks = set()
        for tokens in (1, 2, 50):
            traced = trace(plain(select), (PLAIN, inputs(tokens, D)), {}, (0,))
            _, (decision,) = decide(detect(traced), (), {})
            assert decision.op.spec.selects
            assert decision.op.unit == 1
            ks.add(decision.op.k)
        assert len(ks) == 1
        assert least <= ks.pop() <= most

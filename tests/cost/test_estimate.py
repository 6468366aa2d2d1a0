"""How long sites are expected to take, and what follows for the plan."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.estimate import estimate
from hire_rewrite.cost.machine import KINDS
from hire_rewrite.graph.trace import trace
from hire_rewrite.ops.predictors import Read, reads_of
from hire_rewrite.passes.decide import decide
from hire_rewrite.passes.detect import detect
from tests.cases import Oracle

FREE = machines._PUBLISHED["bytes"]


def head(w, x):
    return x @ w.T


def block(w, x):
    return (jax.nn.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"]


def shapes(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def decided(rule, machine, tokens=1, n=8192, d=64, dtype=jnp.float32):
    """The plan and the decision for a head of n rows, or a block of n neurons."""
    if isinstance(rule, hire.Head):
        fn, weights = head, shapes(n, d, dtype=dtype)
    else:
        fn, weights = block, {name: shapes(n, d, dtype=dtype) for name in ("gate", "up", "down")}
    traced = trace(fn, (weights, shapes(tokens, d, dtype=dtype)), {}, (0,))
    plan, (decision,) = decide(detect(traced, [rule]), [rule], {}, machine=machine)
    return plan, decision


def estimated(rule, machine, tokens=1, **sizes):
    _, decision = decided(dataclasses.replace(rule, force=True), machine, tokens, **sizes)
    return estimate(decision.op, tokens, machine)


@pytest.mark.parametrize(
    "rule", [hire.Head(), hire.FFN(k=0.05), hire.FFN(k=1.0), hire.Head(predictor=hire.LowRank(16))]
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_where_only_bytes_count_time_is_bytes(rule, tokens):
    got = estimated(rule, FREE, tokens)
    assert (got.dense, got.rewritten) == (got.before, got.after)
    assert got.ratio == got.before / got.after


def test_every_constant_counts():
    rule = hire.Head(k=4, candidates=16, predictor=hire.Quantized(8))
    base = estimated(rule, FREE, 2)
    scores, pieces = 2 * 8192, 2 * 16
    for name, more in (("score", scores), ("piece", pieces), ("site", 1)):
        got = estimated(rule, dataclasses.replace(FREE, **{name: 100.0}), 2)
        assert (got.rewritten - base.rewritten, got.dense) == (100.0 * more, base.dense)
    slow = estimated(rule, dataclasses.replace(FREE, product=100.0), 2)
    assert (slow.rewritten, slow.dense) == (base.rewritten, base.dense + 100.0)
    for kind, size in (
        ("dense_float32", 0),
        ("scored_int8", 8192 * (64 + 4)),
        ("fetched_float32", pieces * 64 * 4),
        ("scored_int4", 0),
    ):
        slow = dataclasses.replace(FREE, **{kind: (3.0,) * 5})
        assert estimated(rule, slow, 2).rewritten - base.rewritten == 2 * size
    ffn = hire.FFN(k=80, candidates=160, group=8)
    more = estimated(ffn, dataclasses.replace(FREE, piece=1.0)).rewritten
    assert more - estimated(ffn, FREE).rewritten == 160 / 8 + 80 / 8


def test_a_site_runs_as_often_as_its_loop():
    def layers(w, x):
        return jax.lax.scan(lambda x, w: (block(w, x), None), x, w)[0]

    weights = {name: shapes(3, 512, 64) for name in ("gate", "up", "down")}
    found = detect(trace(layers, (weights, shapes(1, 64)), {}, (0,)))
    rule = hire.FFN(k=0.05, force=True)
    slow = dataclasses.replace(FREE, site=7.0)
    _, (decision,) = decide(found, [rule], {}, machine=slow)
    got = estimate(decision.op, 1, slow)
    assert got.rewritten == got.after + 3 * 7.0


def test_what_would_be_slower_stays_dense_unless_forced():
    slow = dataclasses.replace(FREE, name="slow", site=8192 * 64 * 4.0)
    plan, decision = decided(hire.Head(), slow)
    (site,) = plan.sites
    assert (site.status, decision.packs) == ("dense", False)
    assert site.expected == pytest.approx(8192 * 64 / (8192 * 64 + 8192 * 17 + 256 * 64))
    assert site.reason.startswith(
        f"expected {site.expected:.2f} times as fast as dense (would read 0.6 MB instead of 2.1), "
        f"and has to be {slow.margin:.1f}: ask for fewer candidates or a smaller predictor, or "
        "give force=True"
    )
    plan, decision = decided(hire.Head(force=True), slow)
    assert (plan.sites[0].status, decision.packs) == ("rewritten", True)
    assert plan.sites[0].expected == site.expected
    assert decided(hire.Head(), FREE)[0].sites[0].status == "rewritten"


def test_a_site_has_to_gain_more_than_estimates_err():
    (site,) = decided(hire.Head(), FREE)[0].sites
    for margin, status in ((0.99 * site.expected, "rewritten"), (1.01 * site.expected, "dense")):
        machine = dataclasses.replace(FREE, margin=margin)
        assert decided(hire.Head(), machine)[0].sites[0].status == status


def test_what_pays_for_several_tokens_is_packed():
    """The dense product of this machine is slow for more tokens than one."""
    odd = dataclasses.replace(
        FREE, dense_float32=(1.0, 8.0, 8.0, 8.0, 8.0), site=3.0 * 8192 * 64 * 4
    )
    for tokens, status in ((1, "dense"), (2, "rewritten"), (4, "rewritten")):
        plan, decision = decided(hire.Head(), odd, tokens)
        assert (plan.sites[0].status, decision.packs) == (status, True)
    plan, decision = decided(hire.Head(max_tokens=1), odd)
    assert (plan.sites[0].status, decision.packs) == ("dense", False)


def test_a_wide_product_of_narrow_weights_takes_the_less_of_both():
    def widened(w, x):
        return x @ w.astype(jnp.float32)

    slow_half = dataclasses.replace(FREE, dense_bfloat16=(50.0,) * 5)
    args = (shapes(64, 8192, dtype=jnp.bfloat16), shapes(1, 64))
    found = detect(trace(widened, args, {}, (0,)))
    for machine, each in ((FREE, 2), (slow_half, 4)):
        _, (decision,) = decide(found, [hire.Head(force=True)], {}, machine=machine)
        got = estimate(decision.op, 1, machine)
        assert got.dense == 8192 * 64 * each
    assert estimated(hire.Head(), slow_half, dtype=jnp.bfloat16).dense == 8192 * 64 * 2 * 50


@pytest.mark.parametrize(
    "predictor",
    [
        hire.Quantized(8),
        hire.Quantized(4),
        hire.LowRank(16),
        hire.LowRank(16, bits=None),
        hire.Cascade(hire.LowRank(16), hire.Quantized(), 100),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_add_up_to_bytes(predictor, dtype):
    for tokens in (1, 2):
        reads = predictor.reads(1000, 64, jnp.dtype(dtype), tokens)
        assert sum(r.bytes for r in reads) == predictor.bytes(1000, 64, jnp.dtype(dtype), tokens)
        assert {r.kind for r in reads} <= set(KINDS)


def test_a_predictor_of_the_users_reads_as_fast_as_dense():
    @dataclasses.dataclass(frozen=True)
    class Own(Oracle):
        def bytes(self, n, d, dtype, tokens=1):
            return n * tokens

    assert reads_of(Own(), 100, 64, jnp.float32, 3) == (Read("dense_float32", 300, 3),)
    fast = dataclasses.replace(FREE, dense_float32=(0.5,) * 5)
    rule = hire.Head(k=4, candidates=16, predictor=Own())
    assert estimated(rule, fast).rewritten == 0.5 * 8192 + 16 * 64 * 4


def test_a_read_of_no_kind():
    with pytest.raises(hire.HireRewriteError, match="kind='int3' is none of dense_float32, "):
        FREE.time(Read("int3", 1))


@pytest.mark.parametrize(
    ("name", "rule", "tokens", "n", "d", "pays"),
    [
        ("cpu", hire.Head(candidates=512), 1, 131_072, 2048, True),
        ("cpu", hire.Head(candidates=512), 4, 131_072, 2048, True),
        ("cpu", hire.Head(candidates=512, predictor=hire.Quantized(4)), 1, 131_072, 2048, True),
        ("cpu", hire.Head(candidates=512, predictor=hire.LowRank(256)), 1, 49_152, 576, True),
        ("cpu", hire.FFN(k=0.05), 1, 8192, 2048, True),
        ("cpu", hire.FFN(k=0.05), 1, 256, 64, False),
        ("cpu", hire.Head(), 1, 4096, 32, False),
        ("cpu-jax", hire.Head(candidates=512), 1, 131_072, 2048, True),
        ("cpu-jax", hire.Head(predictor=hire.Quantized(4)), 1, 131_072, 2048, False),
        ("cpu-jax", hire.FFN(k=0.05), 1, 8192, 2048, True),
        ("tpu v5e", hire.Head(predictor=hire.LowRank(256)), 1, 262_144, 4096, True),
        ("gpu", hire.FFN(k=0.05), 1, 1536, 576, False),
    ],
)  # fmt: skip
def test_signs_on_machines_that_are_known(name, rule, tokens, n, d, pays):
    machine = machines._known(name)
    assert estimated(rule, machine, tokens, n=n, d=d).pays == pays
    (site,) = decided(rule, machine, tokens, n=n, d=d)[0].sites
    assert (site.status == "rewritten") == pays


def test_the_printed_plan():
    slow = dataclasses.replace(FREE, name="slow", site=1e6)
    plan, _ = decided(hire.Head(), slow, n=40_000)
    plan = dataclasses.replace(plan, kernels="in use")
    (site,) = plan.sites
    site = dataclasses.replace(site, source="model.py:7")
    assert str(dataclasses.replace(plan, sites=(site,))) == (
        "1 site(s), 1 rewritten\n"
        "  site  kind  layer       runs  tokens  MB read     expected  status     reason\n"
        "  w     head  64 → 40000  1     1       10.2 → 2.8  2.71 ×    rewritten  top 64 of 256 "
        "candidates of 40000, guessed by Quantized(bits=8)\n"
        "expected on: slow\n"
        "kernels for CPU: in use"
    )


def test_without_a_rule_nothing_is_expected():
    plan = hire.inspect(head, shapes(8192, 64), shapes(1, 64), rules=(hire.FFN(k=1),))
    assert plan.sites[0].expected is None
    assert "expected on" not in str(plan)
    assert plan.machine == "bytes"

"""How long sites are expected to take, and what follows for the plan."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import hire_rewrite as hire
from hire_rewrite.cost import machine as machines
from hire_rewrite.cost.machine import KINDS
from hire_rewrite.ops.predictors import Read, reads_of
from hire_rewrite.sites.ffn import positive_sizes
from tests.cases import Oracle

FREE = machines.current()
"""The machine of tests, on which nothing but bytes takes time."""


def head(w, x):
    return x @ w.T


def block(w, x):
    return (jax.nn.silu(x @ w["gate"].T) * (x @ w["up"].T)) @ w["down"]


def shapes(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture
def on(monkeypatch):
    """Plans are for a machine from here on: FREE, or one known by name, with other constants."""

    def on(machine=FREE, **constants):
        if isinstance(machine, str):
            monkeypatch.setenv(machines.VARIABLE, machine)
            machine = machines.current.__wrapped__()
        changed = dataclasses.replace(machine, **constants)
        monkeypatch.setattr(machines, "current", lambda: changed)

    return on


def call(rule, tokens=1, n=8192, d=64, dtype=jnp.float32):
    """A head of n rows or a block of n neurons, transformed, and what it is called with."""
    if isinstance(rule, hire.Head):
        fn, weights = head, shapes(n, d, dtype=dtype)
    else:
        fn, weights = block, {name: shapes(n, d, dtype=dtype) for name in ("gate", "up", "down")}
    return hire.transform(fn, rule), (weights, shapes(tokens, d, dtype=dtype))


def planned(rule, tokens=1, **sizes):
    step, args = call(rule, tokens, **sizes)
    (site,) = step.plan(*args).sites
    return site


def packs(rule, tokens=1):
    step, args = call(rule, tokens)
    return len(step.pack(*args).sites) == 1


@pytest.mark.parametrize(
    "rule",
    [
        hire.Head(force=True),
        hire.FFN(k=0.05, force=True),
        hire.FFN(k=1.0, force=True),
        hire.Head(predictor=hire.LowRank(16), force=True),
    ],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_where_only_bytes_count_time_is_bytes(rule, tokens):
    site = planned(rule, tokens)
    assert site.expected == site.bytes_before / site.bytes_after


def test_every_constant_counts(on):
    rule = hire.Head(k=4, candidates=16, predictor=hire.Quantized(8), force=True)
    site = planned(rule, 2)
    dense, rewritten = site.bytes_before, site.bytes_after
    scores, rows = 2 * 8192, 2 * 16
    for name, more in (("score", scores), ("piece", rows), ("site", 1)):
        on(**{name: 100.0})
        assert planned(rule, 2).expected == pytest.approx(dense / (rewritten + 100.0 * more))
    on(product=100.0)
    assert planned(rule, 2).expected == pytest.approx((dense + 100.0) / rewritten)
    for kind, size in (
        ("scored_int8", 8192 * (64 + 4)),
        ("fetched_float32", rows * 64 * 4),
        ("scored_int4", 0),
    ):
        on(**{kind: (3.0,) * 5})
        assert planned(rule, 2).expected == pytest.approx(dense / (rewritten + 2 * size))
    on(dense_float32=(3.0,) * 5)
    assert planned(rule, 2).expected == pytest.approx(3 * dense / rewritten)
    ffn = hire.FFN(k=80, candidates=160, group=8, force=True)
    on(piece=1.0)
    site = planned(ffn)
    pieces = 160 / 8 + 80 / 8
    assert site.expected == pytest.approx(site.bytes_before / (site.bytes_after + pieces))


def test_a_site_runs_as_often_as_its_loop(on):
    def layers(w, x):
        return jax.lax.scan(lambda x, w: (block(w, x), None), x, w)[0]

    weights = {name: shapes(3, 512, 64) for name in ("gate", "up", "down")}
    on(site=7.0)
    rules = [hire.FFN(k=0.05, force=True)]
    (site,) = hire.inspect(layers, weights, shapes(1, 64), rules=rules).sites
    assert site.expected == pytest.approx(site.bytes_before / (site.bytes_after + 3 * 7.0))


def test_what_would_be_slower_stays_dense_unless_forced(on):
    assert planned(hire.Head()).status == "rewritten"
    on(name="slow", site=8192 * 64 * 4.0)
    site = planned(hire.Head())
    assert site.status == "dense"
    assert site.expected == pytest.approx(8192 * 64 / (8192 * 64 + 8192 * 17 + 256 * 64))
    assert f"expected {site.expected:.2f}" in site.reason
    assert not packs(hire.Head())
    forced = planned(hire.Head(force=True))
    assert (forced.status, forced.expected) == ("rewritten", site.expected)
    assert packs(hire.Head(force=True))


def test_a_site_has_to_gain_more_than_estimates_err(on):
    site = planned(hire.Head())
    for margin, status in ((0.99 * site.expected, "rewritten"), (1.01 * site.expected, "dense")):
        on(margin=margin)
        assert planned(hire.Head()).status == status


def test_what_pays_for_several_tokens_is_packed(on):
    """The dense product of this machine is slow for more tokens than one."""
    on(dense_float32=(1.0, 8.0, 8.0, 8.0, 8.0), site=3.0 * 8192 * 64 * 4)
    for tokens, status in ((1, "dense"), (2, "rewritten"), (4, "rewritten")):
        assert (planned(hire.Head(), tokens).status, packs(hire.Head(), tokens)) == (status, True)
    once = hire.Head(max_tokens=1)
    assert (planned(once).status, packs(once)) == ("dense", False)


def test_a_wide_product_of_narrow_weights_takes_the_less_of_both(on):
    def widened(w, x):
        return x @ w.astype(jnp.float32)

    args = (shapes(64, 8192, dtype=jnp.bfloat16), shapes(1, 64))
    for half, each in ((1.0, 2), (50.0, 4)):
        on(dense_bfloat16=(half,) * 5)
        (site,) = hire.inspect(widened, *args, rules=[hire.Head(force=True)]).sites
        assert site.expected == pytest.approx(8192 * 64 * each / site.bytes_after)
    site = planned(hire.Head(force=True), dtype=jnp.bfloat16)
    assert site.expected == pytest.approx(8192 * 64 * 2 * 50 / site.bytes_after)


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


def test_a_predictor_of_the_users_reads_as_fast_as_dense(on):
    @dataclasses.dataclass(frozen=True)
    class Own(Oracle):
        def bytes(self, n, d, dtype, tokens=1):
            return n * tokens

    assert reads_of(Own(), 100, 64, jnp.float32, 3) == (Read("dense_float32", 300, 3),)
    on(dense_float32=(0.5,) * 5)
    site = planned(hire.Head(k=4, candidates=16, predictor=Own(), force=True))
    assert site.expected == pytest.approx(0.5 * site.bytes_before / (0.5 * 8192 + 16 * 64 * 4))


def test_a_read_of_no_kind():
    with pytest.raises(hire.HireRewriteError, match="int3"):
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
def test_signs_on_machines_that_are_known(on, name, rule, tokens, n, d, pays):
    on(name)
    assert (planned(rule, tokens, n=n, d=d).status == "rewritten") == pays


@pytest.mark.parametrize(
    ("tokens", "share", "pays"), [(1, 0.1, True), (2, 0.02, True), (4, 0.1, False), (1, 0.5, False)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_tpu_a_block_without_its_zeros_stays_dense_where_rows_are_many(
    on, monkeypatch, tokens, share, pays, dtype
):
    on("tpu v5e")
    monkeypatch.setattr(positive_sizes, "SHARE", share)
    weights = {"up": shapes(4096, 16_384, dtype=dtype), "down": shapes(16_384, 4096, dtype=dtype)}
    args = weights, shapes(tokens, 4096, dtype=dtype)
    step = hire.transform(lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"])
    (site,) = step.plan(*args).sites
    assert (site.status == "rewritten") == pays
    if pays:
        assert site.bytes_after * 1.2 < site.bytes_before


def test_the_plan_names_its_machine(on):
    on(name="slow", site=1e6)
    step, args = call(hire.Head(), n=40_000)
    plan = step.plan(*args)
    assert plan.machine == "slow"
    assert "slow" in str(plan)


def test_without_a_rule_nothing_is_expected():
    step, args = call(hire.Head())
    plan = hire.inspect(step.fn, *args, rules=(hire.FFN(k=1),))
    assert plan.sites[0].expected is None
    assert plan.machine == FREE.name
